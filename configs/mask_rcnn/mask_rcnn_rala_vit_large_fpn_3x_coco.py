_base_ = "./mask_rcnn_rala_vit_small_fpn_3x_coco.py"

model = dict(backbone=dict(model_name="rala_vit_large", drop_path_rate=0.55))
# The rate is for one image on each of 8 GPUs.
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
