# SLAB-DeiT's recipe for ImageNet-1K (arXiv:2405.11582): SLAB-Swin's, without stochastic depth.
_base_ = "./slab_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="slab_deit_tiny", drop_path_rate=0.0))
