# SLAB-Swin's recipe for ImageNet-1K (arXiv:2405.11582): Swin's, in which the norms move from layer
# to batch normalisation in a number of iterations that does not depend on the batch. The authors
# refine the running statistics in ten more passes over the training images, which is left out.
_base_ = "../swin/softmax_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="slab_swin_tiny"))

default_hooks = dict(norm_progress=dict(type="NormProgressHook", iterations=60_000))
