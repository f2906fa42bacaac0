_base_ = "./flatten_pvt_medium_300e_in1k.py"

model = dict(backbone=dict(model_name="flatten_pvt_large"))

# 32 images on each of 8 GPUs: all rates are a quarter of those of a batch of 1,024.
train_dataloader = dict(batch_size=32)
auto_scale_lr = dict(base_batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=2.5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=5e-6,
        T_max=295,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]
