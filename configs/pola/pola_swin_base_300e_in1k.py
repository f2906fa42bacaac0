_base_ = "../flatten/flatten_swin_base_300e_in1k.py"

model = dict(backbone=dict(model_name="pola_swin_base"))
