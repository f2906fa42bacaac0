_base_ = "./softmax_swin_tiny_30e_in22k_ft_in1k.py"

model = dict(backbone=dict(model_name="softmax_swin_base.ms_in22k", drop_path_rate=0.2))
