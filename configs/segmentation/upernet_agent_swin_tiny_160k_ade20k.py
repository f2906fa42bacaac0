# Agent Attention's recipe (arXiv:2312.08874): Swin's, with more agents than in pretraining and
# no decay for the agents' biases.
_base_ = "./upernet_softmax_swin_tiny_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="agent_swin_tiny",
        mixer_options=dict(agent=dict(agent_grid=(9, 12, 14, 7))),
    )
)

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            map_bias=dict(decay_mult=0.0),
            row_bias=dict(decay_mult=0.0),
            column_bias=dict(decay_mult=0.0),
        )
    )
)
