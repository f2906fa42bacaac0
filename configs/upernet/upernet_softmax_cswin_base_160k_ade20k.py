_base_ = "./upernet_softmax_cswin_tiny_160k_ade20k.py"

model = dict(backbone=dict(model_name="softmax_cswin_base", drop_path_rate=0.6))
