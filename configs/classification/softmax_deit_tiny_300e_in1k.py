# DeiT's recipe for ImageNet-1K, without distillation (arXiv:2012.12877). It differs from the
# authors' code in two points: the schedule moves in each iteration, where theirs moves once an
# epoch; and the cosine starts at the full rate after the warm-up, where theirs counts the
# warm-up in (0.07 % less).
_base_ = [
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    type="ImageClassifier",
    backbone=dict(model_name="softmax_deit_tiny", drop_path_rate=0.1),
    num_classes=1000,
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch"),
)
