_base_ = "./slab_deit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="slab_deit_small"))
