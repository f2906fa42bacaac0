# FLatten-PVTv2's recipe for ImageNet-1K (arXiv:2308.00442), which is that of FLatten-PVT.
_base_ = "./flatten_pvt_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="flatten_pvtv2_b0"))
