# Swin's recipe for ImageNet-1K (arXiv:2103.14030). The cosine starts at the full rate after the
# warm-up, as by WARMUP_PREFIX in the authors' code.
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(model_name="softmax_swin_tiny", drop_path_rate=0.2))

optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        T_max=280,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]

train_dataloader = dict(sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True))
