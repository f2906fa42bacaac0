_base_ = "./softmax_swin_base_30e_in22k_ft_in1k.py"

model = dict(backbone=dict(model_name="softmax_swin_base.ms_in22k_384"))

# Images are resized without a crop.
train_dataloader = dict(dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
test_dataloader = val_dataloader
