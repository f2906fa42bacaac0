_base_ = "./slab_pvt_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="slab_pvt_small", drop_path_rate=0.1))

# 64 images on each of 8 GPUs: all rates are half of those of a batch of 1,024.
train_dataloader = dict(batch_size=64)
auto_scale_lr = dict(base_batch_size=512)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        T_max=295,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]
