_base_ = "./slab_pvt_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="prepbn_pvt_tiny"))
