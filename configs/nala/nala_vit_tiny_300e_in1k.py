# NaLaFormer's recipe for ImageNet-1K (arXiv:2506.21137), which is that of RAVLT.
_base_ = "../ravlt/rala_vit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="nala_vit_tiny"))
