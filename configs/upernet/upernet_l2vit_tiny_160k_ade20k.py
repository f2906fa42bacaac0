# L2ViT's recipe (arXiv:2501.16182).
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/upernet_160k.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(backbone=dict(model_name="l2vit_tiny", drop_path_rate=0.3, output_norm_eps=1e-5))
