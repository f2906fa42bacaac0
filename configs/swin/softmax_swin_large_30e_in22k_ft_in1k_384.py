_base_ = "./softmax_swin_base_30e_in22k_ft_in1k_384.py"

model = dict(backbone=dict(model_name="softmax_swin_large.ms_in22k_384"))
