# Agent-DeiT's recipe for ImageNet-1K (arXiv:2312.08874): DeiT's with a warm-up of 20 epochs,
# clipped gradients and no repeated augmentation. It differs from the authors' code in two
# points: the cosine starts at the full rate after the warm-up, where theirs counts the warm-up in
# (1 % less); and training is in bfloat16, theirs in float32.
_base_ = "../deit/softmax_deit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_deit_small"))

optim_wrapper = dict(dtype="bfloat16", loss_scale=1.0, clip_grad=dict(max_norm=5.0))
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
# Both sides are resized to 256; the aspect ratio is not kept.
val_dataloader = dict(dataset=dict(transform=dict(crop_mode="squash")))
test_dataloader = val_dataloader
