# Agent Attention's recipe (arXiv:2312.08874): Swin's, with more agents than in pretraining and
# no decay for the agents' biases.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/upernet_160k.py",
    "../_base_/decay/agent_swin.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(
    backbone=dict(
        model_name="agent_swin_tiny",
        drop_path_rate=0.3,
        output_norm_eps=1e-5,
        mixer_options=dict(agent=dict(agent_grid=(9, 12, 14, 7))),
    )
)

optim_wrapper = dict(paramwise_cfg=_base_.paramwise_cfg)
