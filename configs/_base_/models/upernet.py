model = dict(
    type="SemanticSegmentor",
    backbone=dict(pretrained=True),
    decode_head=dict(type="UPerHead", channels=512),
    auxiliary_head=dict(type="FCNHead", channels=256, in_index=2),
    auxiliary_weight=0.4,
    num_classes=150,
)
