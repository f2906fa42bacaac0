# No weight decay for norms. A config names it as optim_wrapper.paramwise_cfg=_base_.paramwise_cfg.
paramwise_cfg = dict(custom_keys=dict(norm=dict(decay_mult=0.0)))
