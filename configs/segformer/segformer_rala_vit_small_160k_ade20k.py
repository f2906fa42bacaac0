# SegFormer's recipe (arXiv:2105.15203) on another backbone, without a published result. The head is
# as wide as those of SegFormer-B2 to -B5, and learns ten times as fast as the backbone. Training is
# in bfloat16, theirs in float32.
_base_ = [
    "../_base_/models/segformer.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/segformer_160k.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(
    backbone=dict(
        model_name="rala_vit_small", pretrained=True, drop_path_rate=0.15, output_norm_eps=1e-6
    )
)
