# DeiT's recipe for ImageNet-1K, without distillation (arXiv:2012.12877). It differs from the
# authors' code in two points: the schedule moves in each iteration, where theirs moves once per
# epoch; and the cosine starts at the full rate after the warm-up, where theirs counts the
# warm-up in (0.07 % less).
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(model_name="softmax_deit_tiny", drop_path_rate=0.1))
