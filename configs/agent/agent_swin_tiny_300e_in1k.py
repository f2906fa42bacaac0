# Agent-Swin's recipe for ImageNet-1K (arXiv:2312.08874): Swin's.
_base_ = "../swin/softmax_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_swin_tiny"))

# Both sides are resized to 256; the aspect ratio is not kept.
val_dataloader = dict(dataset=dict(transform=dict(crop_mode="squash")))
test_dataloader = val_dataloader
