# The authors' model has batch norms from the beginning: there is no transition.
_base_ = "../swin/softmax_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="prepbn_deit_tiny", drop_path_rate=0.0))
