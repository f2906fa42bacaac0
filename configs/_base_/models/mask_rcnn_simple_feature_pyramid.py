# Mask R-CNN on a plain vision transformer of timm, as ViTDet has it (arXiv:2203.16527): a config
# adds model_name.
_base_ = "mask_rcnn_fpn.py"

model = dict(neck=dict(_delete_=True, type="SimpleFeaturePyramid", out_channels=256))
