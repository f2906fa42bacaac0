# EcoFormer's fine-tuning on ImageNet-1K (arXiv:2209.09004), from its released weights, which bring
# the hash functions. The authors begin with PVTv2's weights, and learn the hash functions from the
# first batch. It differs in one more point: the warm-up and the schedule move in each iteration.
# Drop path is off, as it is in the authors' training, which leaves the model in evaluation mode.
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(model_name="ecoformer_pvtv2_b0", pretrained=True))

# 32 images on each of 8 GPUs. The learning rate is 5e-5 * batch / 512.
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=2.5e-5))
auto_scale_lr = dict(base_batch_size=256)
param_scheduler = [
    # From 1e-7 * batch / 512.
    dict(type="LinearLR", start_factor=2e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        T_max=25,
        begin=5,
        end=30,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=30)
