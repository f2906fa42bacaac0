# UperNet by the recipe of Swin, as FLatten Transformer (arXiv:2308.00442) is trained.
_base_ = "./upernet_softmax_swin_tiny_160k_ade20k.py"

model = dict(backbone=dict(model_name="flatten_swin_tiny"))
