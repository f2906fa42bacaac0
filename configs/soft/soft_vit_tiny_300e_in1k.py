# SOFT's recipe for ImageNet-1K (arXiv:2110.11945). It differs from the authors' code in four
# points: the schedule moves in each iteration, where theirs moves once per epoch; training is in
# bfloat16, theirs in float32 unless asked; the warm-up starts at a thousandth of the rate,
# theirs at 1e-6, which is the same here alone; and the batch is 1,024 for every size, where
# theirs is 32 per GPU, of a number of GPUs that is not published, from the medium size on.
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

# Images are erased after they were mixed, as timm's prefetching loader does it.
model = dict(
    backbone=dict(model_name="soft_vit_tiny", drop_path_rate=0.1),
    erasing=dict(probability=0.25, mode="pixel"),
)
# The stem's batch norms take the statistics of each GPU.
sync_bn = None

train_dataloader = dict(
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True),
    dataset=dict(transform=dict(interpolation="random", re_prob=0.0)),
)
# Resize the shorter side to 248, and crop the centre.
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.9)))
test_dataloader = val_dataloader

optim_wrapper = dict(dtype="bfloat16", loss_scale=1.0, clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=10, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=5e-5,
        T_max=290,
        begin=10,
        end=300,
        convert_to_iter_based=True,
    ),
]

default_hooks = dict(
    ema=dict(
        type="EMAHook", ema_type="FusedExponentialMovingAverage", momentum=4e-5, update_buffers=True
    )
)
