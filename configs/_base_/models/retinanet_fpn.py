# mmdet's RetinaNet on any backbone of timm: a config adds model_name and the channels.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"

model = dict(backbone=dict(_delete_=True, type="TimmBackbone", pretrained=True))
