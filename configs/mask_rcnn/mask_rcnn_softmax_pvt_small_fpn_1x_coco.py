_base_ = "./mask_rcnn_softmax_pvt_tiny_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="softmax_pvt_small"))
