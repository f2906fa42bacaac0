# The authors train this size at 448 px.
_base_ = "../agent/agent_deit_small_300e_in1k_448.py"

model = dict(backbone=dict(model_name="inline_deit_base"))
