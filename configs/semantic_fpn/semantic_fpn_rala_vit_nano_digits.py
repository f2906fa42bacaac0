_base_ = "../segformer/segformer_rala_vit_nano_digits.py"

model = dict(
    neck=dict(type="FPN", out_channels=64),
    decode_head=dict(type="FPNHead"),
)
