# SLAB-PVT's recipe for ImageNet-1K (arXiv:2405.11582): ten epochs at the last rate follow the 300.
_base_ = "./slab_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="slab_pvt_tiny", drop_path_rate=0.0))

default_hooks = dict(norm_progress=dict(type="NormProgressHook", iterations=300_000))
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=2e-5,
        T_max=295,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=310)
