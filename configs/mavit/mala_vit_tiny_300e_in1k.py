# MAViT's recipe for ImageNet-1K (arXiv:2507.00698), which is the same as RAVLT's.
_base_ = "../ravlt/rala_vit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="mala_vit_tiny"))
