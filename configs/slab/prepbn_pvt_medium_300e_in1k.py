_base_ = "./slab_pvt_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="prepbn_pvt_medium", drop_path_rate=0.3))
optim_wrapper = dict(clip_grad=dict(_delete_=True, max_norm=1.0))
