# PVT (arXiv:2102.12122) trains by DeiT's recipe.
_base_ = "../deit/softmax_deit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="softmax_pvt_tiny"))
