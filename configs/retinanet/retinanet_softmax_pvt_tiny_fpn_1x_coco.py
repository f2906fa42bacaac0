# RetinaNet by the recipe of PVT (arXiv:2102.12122), whose maps come without the class token.
# Training is in bfloat16, the authors' in float32.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="softmax_pvt_tiny", class_token=False, drop_path_rate=0.1))
optim_wrapper = dict(dtype="bfloat16", loss_scale=1.0, optimizer=dict(weight_decay=1e-4))
