_base_ = "./softmax_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="softmax_swin_base", drop_path_rate=0.5))
