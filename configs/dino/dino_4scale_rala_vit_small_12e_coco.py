# DINO's recipe for 12 epochs (arXiv:2203.03605); no paper on these backbones has such a recipe.
# Training is in bfloat16, DINO's in float32.
_base_ = [
    "../_base_/models/dino_4scale.py",
    "../_base_/datasets/coco_detection_multi_scale.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="rala_vit_small", output_norm_eps=1e-6, drop_path_rate=0.15))
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
optim_wrapper = dict(
    dtype="bfloat16",
    loss_scale=1.0,
    optimizer=dict(weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(custom_keys={"backbone": dict(lr_mult=0.1)}),
)
param_scheduler = [
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[11], gamma=0.1)
]
