# Agent-Swin's recipe for ImageNet-1K (arXiv:2312.08874): Swin's. It differs from the authors' code
# in two points: the cosine starts at the full rate after the warm-up, where theirs counts the
# warm-up in (1 % less); and training is in bfloat16, theirs in float32.
_base_ = "../swin/softmax_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_swin_tiny"))
optim_wrapper = dict(dtype="bfloat16", loss_scale=1.0)

# Both sides are resized to 256; the aspect ratio is not kept.
val_dataloader = dict(dataset=dict(transform=dict(crop_mode="squash")))
test_dataloader = val_dataloader
