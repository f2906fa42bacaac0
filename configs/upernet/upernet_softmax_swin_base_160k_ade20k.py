_base_ = "./upernet_softmax_swin_tiny_160k_ade20k.py"

model = dict(backbone=dict(model_name="softmax_swin_base"))
