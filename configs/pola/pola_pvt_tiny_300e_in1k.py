# Pola-PVT's recipe for ImageNet-1K (arXiv:2501.15061), which is that of FLatten.
_base_ = "../flatten/flatten_pvt_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="pola_pvt_tiny"))
