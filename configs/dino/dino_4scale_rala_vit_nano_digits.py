_base_ = [
    "../_base_/models/dino_4scale.py",
    "../_base_/datasets/digits_detection.py",
    "../_base_/schedules/digits_nmuon.py",
    "../_base_/detection_runtime.py",
]

model = dict(
    num_queries=60,
    backbone=dict(
        model_name="rala_vit_nano",
        pretrained=False,
        out_indices=(0, 1, 2, 3),
        output_norm_eps=1e-6,
    ),
    neck=dict(out_channels=64, norm_cfg=dict(type="GN", num_groups=8)),
    encoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=64, num_heads=4),
            ffn_cfg=dict(embed_dims=64, feedforward_channels=256),
        ),
    ),
    decoder=dict(
        num_layers=3,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=64, num_heads=4),
            cross_attn_cfg=dict(embed_dims=64, num_heads=4),
            ffn_cfg=dict(embed_dims=64, feedforward_channels=256),
        ),
    ),
    positional_encoding=dict(num_feats=32),
    bbox_head=dict(num_classes=10, embed_dims=64),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
    test_cfg=dict(max_per_img=20),
)
optim_wrapper = dict(clip_grad=dict(max_norm=0.1, norm_type=2))
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
