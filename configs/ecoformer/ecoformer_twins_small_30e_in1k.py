_base_ = "./ecoformer_pvtv2_b0_30e_in1k.py"

model = dict(backbone=dict(model_name="ecoformer_twins_small"))

# The learning rate is 25e-5 * batch / 512, and begins at 1e-7 * batch / 512.
optim_wrapper = dict(optimizer=dict(lr=1.25e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=4e-4, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        T_max=25,
        begin=5,
        end=30,
        convert_to_iter_based=True,
    ),
]
