_base_ = "./ecoformer_pvtv2_b0_30e_in1k.py"

model = dict(backbone=dict(model_name="ecoformer_pvtv2_b1"))
