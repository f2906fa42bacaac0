_base_ = "./agent_swin_small_300e_in1k.py"

model = dict(backbone=dict(img_size=288, mixer_options=dict(window=dict(window_size=9))))

# 64 images on each of 8 GPUs: all rates are half of those of a batch of 1,024. Images are resized
# without a crop.
train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=288)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=288, crop_pct=1.0)))
test_dataloader = val_dataloader
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
