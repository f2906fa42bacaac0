# Mask R-CNN by the recipe of Swin, as PRepBN (arXiv:2405.11582) is trained: norms are batch norms
# from the start, with the statistics of pretraining. Training is in bfloat16, the authors' in
# float16.
_base_ = "./mask_rcnn_softmax_swin_tiny_fpn_3x_coco.py"

model = dict(backbone=dict(model_name="prepbn_swin_tiny", norm_eval=True, drop_path_rate=0.2))
optim_wrapper = dict(dtype="bfloat16", loss_scale=1.0)
