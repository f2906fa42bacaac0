_base_ = "./favit_b0_300e_in1k.py"

model = dict(backbone=dict(model_name="favit_b3", drop_path_rate=0.3))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
