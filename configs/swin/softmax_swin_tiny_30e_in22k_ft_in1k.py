# Swin's fine-tuning on ImageNet-1K after ImageNet-22K (arXiv:2103.14030).
_base_ = "./softmax_swin_tiny_300e_in1k.py"

model = dict(
    backbone=dict(model_name="softmax_swin_tiny.ms_in22k", pretrained=True, drop_path_rate=0.1)
)

# The rate is 2e-5 * batch / 512.
optim_wrapper = dict(optimizer=dict(lr=4e-5, weight_decay=1e-8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=4e-7,
        T_max=25,
        begin=5,
        end=30,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=30)
