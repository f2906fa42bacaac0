# Swin's recipe (arXiv:2103.14030). It differs from the authors' code in one point: the decay
# starts at the full rate after the warm-up, where theirs counts the warm-up in (1 % less).
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/upernet_160k.py",
    "../_base_/decay/swin.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(
    backbone=dict(model_name="softmax_swin_tiny", drop_path_rate=0.3, output_norm_eps=1e-5)
)

optim_wrapper = dict(paramwise_cfg=_base_.paramwise_cfg)
