_base_ = "./mask_rcnn_soft_norm_vit_tiny_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="soft_norm_vit_large"))
# The rate is for one image on each of 8 GPUs.
optim_wrapper = dict(optimizer=dict(lr=2e-4 / 1.4))
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
