# mmdet's Mask R-CNN on any backbone of timm: a config adds model_name.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"

model = dict(
    type="TimmMaskRCNN",
    backbone=dict(_delete_=True, type="TimmBackbone", pretrained=True),
    # Without the input channels, which are the backbone's.
    neck=dict(_delete_=True, type="FPN", out_channels=256, num_outs=5),
)
