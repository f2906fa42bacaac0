_base_ = "./agent_pvt_medium_300e_in1k.py"

model = dict(backbone=dict(img_size=256))

# 64 images on each of 8 GPUs: all rates are half of those of a batch of 1,024.
train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=256)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
test_dataloader = val_dataloader
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
