# MAViT's recipe (arXiv:2507.00698), which is the same as RAVLT's.
_base_ = "./semantic_fpn_rala_vit_tiny_80k_ade20k.py"

model = dict(backbone=dict(model_name="mala_vit_tiny", drop_path_rate=0.1))
