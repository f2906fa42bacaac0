_base_ = "./slab_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="slab_swin_small", drop_path_rate=0.3))
