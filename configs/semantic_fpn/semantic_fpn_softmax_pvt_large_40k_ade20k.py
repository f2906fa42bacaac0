_base_ = "./semantic_fpn_softmax_pvt_tiny_40k_ade20k.py"

model = dict(backbone=dict(model_name="softmax_pvt_large"))
