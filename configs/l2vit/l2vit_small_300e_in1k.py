# Stochastic depth is ours for this size, too.
_base_ = "./l2vit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="l2vit_small", drop_path_rate=0.2))
