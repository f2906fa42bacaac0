_base_ = "../agent/agent_swin_base_30e_in1k_384.py"

model = dict(backbone=dict(model_name="pola_swin_base"))
