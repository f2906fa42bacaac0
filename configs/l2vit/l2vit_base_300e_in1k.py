# Stochastic depth is the authors' for this size.
_base_ = "./l2vit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="l2vit_base", drop_path_rate=0.3))
