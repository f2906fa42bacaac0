model = dict(
    type="SemanticSegmentor",
    backbone=dict(pretrained=True),
    neck=dict(type="FPN", out_channels=256),
    decode_head=dict(type="FPNHead", channels=128),
    num_classes=150,
)
