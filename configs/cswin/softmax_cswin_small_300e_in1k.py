_base_ = "./softmax_cswin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="softmax_cswin_small", drop_path_rate=0.4))
