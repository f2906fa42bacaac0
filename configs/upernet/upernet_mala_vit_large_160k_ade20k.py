_base_ = "./upernet_rala_vit_small_160k_ade20k.py"

model = dict(backbone=dict(model_name="mala_vit_large", drop_path_rate=0.55))
# The rate is for one image on each of 8 GPUs.
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
