# No weight decay for norms, Swin's biases of relative positions and the agents' biases.
_base_ = "swin.py"

paramwise_cfg = dict(
    custom_keys=dict(
        map_bias=dict(decay_mult=0.0),
        row_bias=dict(decay_mult=0.0),
        column_bias=dict(decay_mult=0.0),
    )
)
