model = dict(
    type="SemanticSegmentor",
    decode_head=dict(type="SegformerHead", channels=768),
    num_classes=150,
)
