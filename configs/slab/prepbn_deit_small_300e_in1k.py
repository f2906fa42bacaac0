_base_ = "./slab_deit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="prepbn_deit_small"))

default_hooks = dict(norm_progress=dict(type="NormProgressHook", iterations=300_000))
