_base_ = "../flatten/flatten_pvt_medium_300e_in1k.py"

model = dict(backbone=dict(model_name="pola_pvt_medium"))
