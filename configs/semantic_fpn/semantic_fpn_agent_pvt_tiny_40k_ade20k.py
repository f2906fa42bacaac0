# Agent Attention's recipe (arXiv:2312.08874), with more agents than
# in pretraining.
_base_ = [
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/semantic_fpn_80k.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(
    backbone=dict(
        model_name="agent_pvt_tiny",
        drop_path_rate=0.1,
        mixer_options=dict(agent=dict(agent_grid=(12, 16, 28, 28))),
    )
)

optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(max_iters=40000, val_interval=4000)
