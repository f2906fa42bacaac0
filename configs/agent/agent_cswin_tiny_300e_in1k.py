# Agent-CSwin's recipe for ImageNet-1K (arXiv:2312.08874): CSwin's at a batch of 1,024, with
# twice its first and its last rate.
_base_ = "./agent_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_cswin_tiny"))

default_hooks = dict(
    ema=dict(
        type="EMAHook",
        ema_type="FusedExponentialMovingAverage",
        momentum=1.6e-4,
        update_buffers=True,
    )
)
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=2e-5,
        T_max=280,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=310)
