# UPerNet's schedule in bfloat16, and a head that learns ten times as fast as the backbone.
_base_ = ["upernet_160k.py", "../decay/norm.py"]

optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=1.0,
    paramwise_cfg=dict(
        custom_keys=dict(**_base_.paramwise_cfg.custom_keys, decode_head=dict(lr_mult=10.0))
    ),
)
