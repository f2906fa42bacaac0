# VAN's recipe for ImageNet-1K (arXiv:2202.09741): ten epochs at the last rate follow the 300. It
# differs from the authors' code in two points: the schedule moves in each iteration, where theirs
# moves once per epoch; and the cosine starts at the full rate after the warm-up, where theirs
# counts the warm-up in (0.07 % less).
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(model_name="van_b0", drop_path_rate=0.1))

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        T_max=295,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=310)

train_dataloader = dict(
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True),
    dataset=dict(transform=dict(interpolation="random")),
)
# Resize the shorter side to 248, and crop the centre.
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.9)))
test_dataloader = val_dataloader
