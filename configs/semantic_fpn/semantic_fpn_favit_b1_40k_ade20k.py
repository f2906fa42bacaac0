# 8 images on each of 8 GPUs, at the rate of B0, which has 2.
_base_ = "./semantic_fpn_favit_b0_40k_ade20k.py"

model = dict(backbone=dict(model_name="favit_b1"))
train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(base_batch_size=64)
