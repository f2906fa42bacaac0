_base_ = "./slab_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="slab_swin_base", drop_path_rate=0.5))

# 64 images on each of 8 GPUs: all rates are half of those of a batch of 1,024.
train_dataloader = dict(batch_size=64)
auto_scale_lr = dict(base_batch_size=512)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=5e-6,
        T_max=280,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
