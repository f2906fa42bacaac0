_base_ = "./mask_rcnn_mala_vit_small_fpn_3x_coco.py"

model = dict(backbone=dict(model_name="mala_vit_large", drop_path_rate=0.55))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
auto_scale_lr = dict(base_batch_size=32)
train_dataloader = dict(batch_size=1)
