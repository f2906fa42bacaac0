# CARE's recipe for ImageNet-1K (arXiv:2411.16170), without its teacher: the authors have the second
# classifier learn what a RegNetY-16GF says, which gives both halves of the loss; here the mean of
# both classifiers learns the labels. It differs in two more points: the warm-up and the schedule
# move in each iteration, and training is in mixed precision.
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(model_name="care_s0", drop_path_rate=0.1))

# The authors' batch is 128 on each of 12 GPUs.
train_dataloader = dict(sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True))
optim_wrapper = dict(optimizer=dict(lr=2.5e-3))
auto_scale_lr = dict(base_batch_size=1536)

param_scheduler = [
    # From 1e-6.
    dict(type="LinearLR", start_factor=4e-4, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        T_max=280,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
# Ten more epochs at the lowest rate.
train_cfg = dict(max_epochs=310)
