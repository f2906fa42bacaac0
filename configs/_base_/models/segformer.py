model = dict(
    type="SemanticSegmentor",
    decode_head=dict(type="SegformerHead", channels=256),
    num_classes=150,
)
