# PVTv2 (arXiv:2106.13797) trains by the recipe of PVT.
_base_ = "../pvt/softmax_pvt_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="softmax_pvtv2_b0"))
