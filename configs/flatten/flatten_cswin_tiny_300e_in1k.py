# FLatten-CSwin's recipe for ImageNet-1K (arXiv:2308.00442), which is that of Agent-CSwin at
# twice the batch.
_base_ = "../agent/agent_cswin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="flatten_cswin_tiny"))

# 256 images on each of 8 GPUs.
train_dataloader = dict(batch_size=256)
auto_scale_lr = dict(base_batch_size=2048)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=4e-5,
        T_max=280,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
