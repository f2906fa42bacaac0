_base_ = "./slab_cswin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="slab_cswin_small", drop_path_rate=0.3))

# 128 images on each of 8 GPUs.
train_dataloader = dict(batch_size=128)
auto_scale_lr = dict(base_batch_size=1024)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
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
