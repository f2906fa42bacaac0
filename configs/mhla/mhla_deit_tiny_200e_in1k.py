# MHLA's recipe for ImageNet-1K (arXiv:2601.07832). It differs from the authors' code in two points:
# training is in bfloat16, theirs in float32; and the cosine starts at the full rate after the
# warm-up, where theirs counts the warm-up in (0.6 % less). They have published no results.
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="mhla_deit_tiny", drop_path_rate=0.1), mixup=dict(mixup_alpha=0.2)
)

optim_wrapper = dict(dtype="bfloat16")
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=10, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=0.0,
        T_max=190,
        begin=10,
        end=200,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=200)

default_hooks = dict(
    ema=dict(
        type="EMAHook",
        ema_type="FusedExponentialMovingAverage",
        momentum=4e-4,
        update_buffers=True,
    )
)
train_dataloader = dict(sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True))
