# The authors train this size at 288 px.
_base_ = "../agent/agent_deit_small_300e_in1k.py"

model = dict(backbone=dict(model_name="inline_deit_small", img_size=288))

train_dataloader = dict(dataset=dict(transform=dict(input_size=288)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=288)))
test_dataloader = val_dataloader
