_base_ = "./flatten_pvtv2_b0_300e_in1k.py"

model = dict(backbone=dict(model_name="flatten_pvtv2_b3", drop_path_rate=0.3))
optim_wrapper = dict(clip_grad=dict(_delete_=True, max_norm=1.0))
