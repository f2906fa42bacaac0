# CSwin's recipe for ImageNet-1K (arXiv:2107.00652): ten epochs at the last rate follow the 300,
# and the averaged weights are evaluated. It differs from the authors' code in two points: the
# schedule moves in each iteration, where theirs moves once per epoch; the cosine starts at the
# full rate after the warm-up, where theirs counts the warm-up in (1 % less).
_base_ = "../swin/softmax_swin_tiny_300e_in1k.py"

# Images are erased after they were mixed, as timm's prefetching loader does it.
model = dict(
    backbone=dict(model_name="softmax_cswin_tiny"), erasing=dict(probability=0.25, mode="pixel")
)

# 256 images on each of 8 GPUs.
default_hooks = dict(
    ema=dict(
        type="EMAHook",
        ema_type="FusedExponentialMovingAverage",
        momentum=1.6e-4,
        update_buffers=True,
    )
)
train_dataloader = dict(
    batch_size=256, dataset=dict(transform=dict(interpolation="random", re_prob=0.0))
)
auto_scale_lr = dict(base_batch_size=2048)
optim_wrapper = dict(clip_grad=None, optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-4, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        T_max=280,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=310)

# Resize the shorter side to 248, and crop the centre.
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.9)))
test_dataloader = val_dataloader
