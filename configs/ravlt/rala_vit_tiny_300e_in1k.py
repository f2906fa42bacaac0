# RAVLT's recipe for ImageNet-1K (arXiv:2411.07635). It differs from the authors' code in three
# points: the schedule moves in each iteration, where theirs moves once per epoch and one epoch
# late; the cosine starts at the full rate after the warm-up, where theirs counts the warm-up
# in (0.07 % less); and the averaged weights alone are evaluated, where theirs take the better.
_base_ = [
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/in1k_adamw_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(model_name="rala_vit_tiny", drop_path_rate=0.1))

default_hooks = dict(
    ema=dict(type="BatchScaledEMAHook", decay=0.99996, base_batch_size=512, update_buffers=True)
)
