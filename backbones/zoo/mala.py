"""MAViT: magnitude-aware linear attention in the body of RAVLT."""

from ..registry import Model, Weights, register
from . import bodies, papers

MALA = bodies.RAVLT(
    paper=papers.MALA,
    config={"mixer": ("mala", "mala", "gated_softmax", "gated_softmax"), "head_hidden_size": 2048},
)

# Their repository is on the hub, but its authors do not print the names of its files.
MAVIT = {"in1k": Weights(page="https://huggingface.co/aldjalkdf/MAViT/tree/main")}


register(
    __name__,
    {
        "mala_vit_nano": Model(MALA, bodies.RAVLT_NANO),
        "mala_vit_tiny": Model(MALA, bodies.RAVLT_TINY, MAVIT, parameters=16_449_128, top1=82.9),
        "mala_vit_small": Model(MALA, bodies.RAVLT_SMALL, MAVIT, parameters=27_142_568, top1=84.7),
        "mala_vit_base": Model(MALA, bodies.RAVLT_BASE, MAVIT, parameters=49_792_648, top1=85.7),
        "mala_vit_large": Model(
            MALA,
            bodies.RAVLT_LARGE | {"head_hidden_size": 2560},
            MAVIT,
            parameters=97_766_088,
            top1=86.0,
        ),
        # Ours: the paper's models with its linear attention in all stages, where the authors keep
        # softmax in the last two. Their weights have the shapes of the paper's.
        "mala_vit_tiny_linear": Model(MALA, bodies.RAVLT_TINY | {"mixer": "mala"}),
        "mala_vit_small_linear": Model(MALA, bodies.RAVLT_SMALL | {"mixer": "mala"}),
        "mala_vit_base_linear": Model(MALA, bodies.RAVLT_BASE | {"mixer": "mala"}),
    },
)
