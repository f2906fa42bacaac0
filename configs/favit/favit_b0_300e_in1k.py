# FaViT (arXiv:2312.08614) trains by DeiT's recipe; ten epochs at the last rate follow the 300.
_base_ = "../deit/softmax_deit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="favit_b0"))
train_cfg = dict(max_epochs=310)
