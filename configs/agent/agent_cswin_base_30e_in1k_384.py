# Agent-CSwin's fine-tuning at 384 px after 300 epochs at 224 px (arXiv:2312.08874): 20 epochs, and
# ten more at the last rate. Give the weights as model.backbone.checkpoint=FILE.
_base_ = "./agent_cswin_base_300e_in1k.py"

model = dict(
    backbone=dict(
        img_size=384,
        mixer_options=dict(cross_window=dict(split_size=(1, 2, 12, None))),
        drop_path_rate=0.7,
    )
)
default_hooks = dict(ema=dict(momentum=2e-4))

# 32 images on each of 8 GPUs, and a rate of 5e-6 * batch / 512.
train_dataloader = dict(batch_size=32, dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384)))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=2.5e-6, weight_decay=1e-8))
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=2.5e-7, T_max=20, end=20, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=30)
