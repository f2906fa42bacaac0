# No weight decay for norms and Swin's biases of relative positions.
_base_ = "norm.py"

paramwise_cfg = dict(custom_keys=dict(relative_position_bias_table=dict(decay_mult=0.0)))
