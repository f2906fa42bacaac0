# Agent-Swin's fine-tuning at 384 px after 300 epochs at 224 px (arXiv:2312.08874). Give the weights
# as model.backbone.checkpoint=FILE.
_base_ = "./agent_swin_base_300e_in1k.py"

model = dict(backbone=dict(img_size=384, mixer_options=dict(window=dict(window_size=12))))

# 32 images on each of 8 GPUs, and a rate of 2e-5 * batch / 512. Images are resized without a crop.
train_dataloader = dict(batch_size=32, dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-7,
        T_max=25,
        begin=5,
        end=30,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=30)
