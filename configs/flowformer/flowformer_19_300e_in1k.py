# Flowformer's recipe for ImageNet-1K (arXiv:2202.06258). It differs in two points: the warm-up and
# the schedule move in each iteration, and training is in mixed precision; the attention's sums are
# in float32.
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(model_name="flowformer_19", drop_path_rate=0.2))

train_dataloader = dict(
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True),
    dataset=dict(transform=dict(re_prob=0.0)),
)
# The learning rate is 5e-4 * batch / 512; the authors' batch is 128 on each of 6 GPUs.
optim_wrapper = dict(optimizer=dict(lr=7.5e-4), clip_grad=dict(max_norm=1.0))
auto_scale_lr = dict(base_batch_size=768)

param_scheduler = [
    # From 1e-6.
    dict(type="LinearLR", start_factor=1.3333e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        T_max=295,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]
