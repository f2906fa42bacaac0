_base_ = "../segformer/segformer_rala_vit_nano_digits.py"

model = dict(
    decode_head=dict(type="UPerHead"),
    auxiliary_head=dict(type="FCNHead", channels=64, dropout_ratio=0.0),
)
