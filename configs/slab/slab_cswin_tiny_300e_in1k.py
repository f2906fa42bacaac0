# SLAB-CSwin's recipe for ImageNet-1K (arXiv:2405.11582): ten epochs at the last rate follow the
# 300.
_base_ = "./slab_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="slab_cswin_tiny", drop_path_rate=0.1))

default_hooks = dict(norm_progress=dict(type="NormProgressHook", iterations=120_000))
# 256 images on each of 8 GPUs.
train_dataloader = dict(batch_size=256)
auto_scale_lr = dict(base_batch_size=2048)
optim_wrapper = dict(clip_grad=None, optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=4e-5,
        T_max=280,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=310)
