# A small transformer with softmax attention, by the recipe of the demonstration: a teacher for
# linearise_digits.py.
_base_ = ["../ravlt/rala_vit_nano_digits.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        model_name="softmax_deit_tiny",
        img_size=64,
        patch_size=8,
        embed_dim=96,
        depth=4,
    )
)
