# CSWin's fine-tuning at 384 px after 300 epochs at 224 px (arXiv:2107.00652): 20 epochs, and ten
# more at the last rate.
_base_ = "./softmax_cswin_base_300e_in1k.py"

model = dict(
    backbone=dict(
        model_name="softmax_cswin_base.ms_in1k",
        pretrained=True,
        img_size=384,
        mixer_options=dict(cross_window=dict(split_size=(1, 2, 12, None))),
        drop_path_rate=0.7,
    ),
    mixup=dict(mixup_alpha=0.1, cutmix_alpha=0.1),
)
default_hooks = dict(ema=dict(momentum=2e-4))

# 32 images on each of 8 GPUs.
train_dataloader = dict(batch_size=32, dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=5e-6, weight_decay=1e-8))
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=5e-7, T_max=20, end=20, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=30)
