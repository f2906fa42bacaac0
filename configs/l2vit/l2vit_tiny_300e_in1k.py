# L2ViT's recipe for ImageNet-1K (arXiv:2501.16182): a batch of 4,096, 128 images on each of 8 GPUs
# and four of them per update. It differs from the authors' code in four points: training is in
# bfloat16, theirs in float32; the cosine starts at the full rate after the warm-up, where theirs
# counts the warm-up in (1 % less); the averaged weights alone are evaluated; and stochastic depth,
# which they have not published for this size, is ours.
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(model_name="l2vit_tiny", drop_path_rate=0.1))

# The rate is for the 1,024 images of an iteration, of which four make an update.
optim_wrapper = dict(dtype="bfloat16", accumulative_counts=4, optimizer=dict(lr=4e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        T_max=280,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]

# The decay is 0.9999 per update.
default_hooks = dict(
    ema=dict(
        type="EMAHook",
        ema_type="FusedExponentialMovingAverage",
        momentum=2.5e-5,
        update_buffers=True,
    )
)
train_dataloader = dict(sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True))
