# Agent-PVT's recipe for ImageNet-1K (arXiv:2312.08874): ten epochs at the last rate follow the
# 300. It differs from the authors' code in two points: the cosine starts at the full rate after
# the warm-up, where theirs counts the warm-up in (0.07 % less); and training is in bfloat16, theirs
# in float32.
_base_ = "./agent_deit_small_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_pvt_tiny"))

optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=2e-5,
        T_max=295,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=310)
