# mmdet's RetinaNet on any backbone of timm: a config adds model_name and the channels.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"

# The first stage's map is not used: given out, its norm would have no gradient, at which
# distributed training stops.
model = dict(
    backbone=dict(_delete_=True, type="TimmBackbone", pretrained=True, out_indices=(1, 2, 3)),
    neck=dict(start_level=0),
)
