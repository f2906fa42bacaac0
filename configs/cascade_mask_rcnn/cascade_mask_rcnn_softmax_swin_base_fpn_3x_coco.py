_base_ = "./cascade_mask_rcnn_softmax_swin_tiny_fpn_3x_coco.py"

model = dict(backbone=dict(model_name="softmax_swin_base", drop_path_rate=0.3))
