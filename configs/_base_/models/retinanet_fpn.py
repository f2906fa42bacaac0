# mmdet's RetinaNet on any backbone of timm: a config adds model_name.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"

model = dict(
    type="TimmRetinaNet",
    # The map of the first stage is not used. If the backbone gave it, its norm would have no
    # gradient, at which distributed training stops.
    backbone=dict(_delete_=True, type="TimmBackbone", pretrained=True, out_indices=(1, 2, 3)),
    # Without the input channels, which are the backbone's.
    neck=dict(_delete_=True, type="FPN", out_channels=256, add_extra_convs="on_input", num_outs=5),
)
