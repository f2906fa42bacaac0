_base_ = "./agent_deit_small_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_deit_tiny", drop_path_rate=0.0))

# 512 images on each of 8 GPUs: all rates are four times those of a batch of 1,024.
train_dataloader = dict(batch_size=512)
auto_scale_lr = dict(base_batch_size=4096)
optim_wrapper = dict(optimizer=dict(lr=4e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=4e-5,
        T_max=280,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
