# Agent-Swin's recipe for ImageNet-1K (arXiv:2312.08874): Swin's. Training is in
# bfloat16, the authors' in float32.
_base_ = "../swin/softmax_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_swin_tiny"))
optim_wrapper = dict(dtype="bfloat16", loss_scale=1.0)

# Both sides are resized to 256; the aspect ratio is not kept.
val_dataloader = dict(dataset=dict(transform=dict(crop_mode="squash")))
test_dataloader = val_dataloader
