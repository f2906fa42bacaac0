# SegFormer's recipe for Cityscapes (arXiv:2105.15203) on another backbone, without a published
# result.
_base_ = [
    "../_base_/models/segformer.py",
    "../_base_/datasets/cityscapes_1024.py",
    "../_base_/schedules/segformer_160k.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(
    backbone=dict(
        model_name="rala_vit_small", pretrained=True, drop_path_rate=0.15, output_norm_eps=1e-6
    ),
    num_classes=19,
    # Images are predicted in windows of the size of the training crops.
    window=(1024, 1024),
    window_stride=(768, 768),
)
auto_scale_lr = dict(base_batch_size=8)
