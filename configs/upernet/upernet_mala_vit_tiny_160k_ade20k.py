# MAViT's recipe (arXiv:2507.00698), which is the same as RAVLT's.
_base_ = "./upernet_rala_vit_small_160k_ade20k.py"

model = dict(backbone=dict(model_name="mala_vit_tiny", drop_path_rate=0.1))
