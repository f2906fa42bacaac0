# A pretrained vision transformer learns to compute with linear attention, from pictures without
# labels. `linsight linearise` sets the teacher, the mixer and the folder.
_base_ = ["../_base_/default_runtime.py"]

custom_imports = dict(
    imports=["linsight.data.classification", "linsight.data.unlabelled", "linsight.heads"]
)
data_root = "pictures"
model = dict(
    type="Linearisation",
    teacher=dict(model_name="softmax_dinov2_small"),
    mixer="mala",
    stages=dict(mixers=0.5, features=0.5),
)
custom_hooks = [dict(type="LinearisationStageHook"), dict(type="BlockErrorsHook")]
default_hooks = dict(
    checkpoint=dict(save_best="agreement/cosine", rule="greater"),
    progress_bar=dict(metrics=("agreement/cosine", "agreement/top1")),
    learning_curve=dict(metrics=("agreement/cosine", "agreement/top1")),
    predictions=None,
)

train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=False,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="PictureFolder",
        root=data_root,
        split="train",
        transform=dict(input_size=224, is_training=True, scale=(0.25, 1.0), hflip=0.5),
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="PictureFolder",
        root=data_root,
        split="val",
        transform=dict(input_size=224, crop_pct=1.0),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Agreement")
test_evaluator = val_evaluator

optim_wrapper = dict(
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(opt="adamw", lr=6e-4, weight_decay=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        T_max=20,
        begin=0,
        end=20,
        convert_to_iter_based=True,
    ),
    # In the stage of the features all weights are trained, and a pretrained model's forget at the
    # rate of new ones (docs/linearise.md).
    dict(type="ConstantLR", factor=0.05, begin=10, convert_to_iter_based=True),
]
# In the first stage the weights outside of the mixers get no gradient.
find_unused_parameters = True
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=2)
val_cfg = dict()
test_cfg = dict()
