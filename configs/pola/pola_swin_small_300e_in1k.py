_base_ = "../flatten/flatten_swin_small_300e_in1k.py"

model = dict(backbone=dict(model_name="pola_swin_small"))
