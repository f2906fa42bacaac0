"""RAVLT: rank-augmented linear attention."""

from ..registry import Model, Weights, register
from . import bodies, papers

RALA = bodies.RAVLT(
    paper=papers.RALA,
    config={"mixer": ("rala", "rala", "gated_softmax", "gated_softmax")},
)


def _ravlt(letter: str) -> dict[str, Weights]:
    return {"in1k": Weights("aldjalkdf/RAVLT", f"RAVLT_{letter}.pth")}


register(
    __name__,
    {
        "rala_vit_nano": Model(RALA, bodies.RAVLT_NANO),
        "rala_vit_tiny": Model(
            RALA,
            bodies.RAVLT_TINY,
            _ravlt("T"),
            parameters=14_897_768,
            top1=82.8,
            mask_rcnn=(47.3, 42.7),
        ),
        "rala_vit_small": Model(
            RALA,
            bodies.RAVLT_SMALL,
            _ravlt("S"),
            parameters=25_591_208,
            top1=84.4,
            mask_rcnn=(49.8, 44.6),
            upernet=50.7,
        ),
        "rala_vit_base": Model(
            RALA,
            bodies.RAVLT_BASE,
            _ravlt("B"),
            parameters=48_241_288,
            top1=85.5,
            mask_rcnn=(51.2, 45.7),
            upernet=52.5,
        ),
        "rala_vit_large": Model(
            RALA,
            bodies.RAVLT_LARGE,
            _ravlt("L"),
            parameters=95_242_440,
            top1=85.8,
            mask_rcnn=(52.3, 46.4),
            upernet=53.2,
        ),
        # Ours: the paper's models with its linear attention in all stages, where the authors keep
        # softmax in the last two. Their weights have the shapes of the paper's.
        "rala_vit_tiny_linear": Model(RALA, bodies.RAVLT_TINY | {"mixer": "rala"}),
        "rala_vit_small_linear": Model(RALA, bodies.RAVLT_SMALL | {"mixer": "rala"}),
        "rala_vit_base_linear": Model(RALA, bodies.RAVLT_BASE | {"mixer": "rala"}),
    },
)
