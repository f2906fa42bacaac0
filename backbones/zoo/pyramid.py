"""RAVLT and MAViT: linear attention in the convolutional pyramid."""

from dataclasses import replace

from ..registry import Family, Model, Weights, register
from ..skeletons import pyramid
from ..skeletons.pyramid import PyramidVisionTransformer
from . import papers

RALA = Family(
    skeleton=PyramidVisionTransformer,
    filter_fn=pyramid.checkpoint_filter_fn,
    paper=papers.RALA,
    first_conv="stem.0",
    classifier="head.fc",
    config={"mixer": ("rala", "rala", "gated_softmax", "gated_softmax")},
)

MALA = replace(
    RALA,
    paper=papers.MALA,
    config={"mixer": ("mala", "mala", "gated_softmax", "gated_softmax"), "head_dim": 2048},
)

# RAVLT and MAViT have one set of shapes, and differ in the mixer and the head.
PYRAMID_NANO = {
    "dims": (32, 64, 128, 192),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 6),
    "head_dim": 512,
}
PYRAMID_TINY = {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
PYRAMID_SMALL = {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
PYRAMID_BASE = {
    "dims": (96, 192, 384, 512),
    "depths": (4, 6, 12, 6),
    "num_heads": (1, 2, 6, 8),
    "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
}
PYRAMID_LARGE = {
    "dims": (96, 192, 448, 640),
    "depths": (4, 7, 19, 8),
    "num_heads": (1, 2, 7, 10),
    "layer_scale": 1e-6,
}


def _ravlt(letter: str) -> dict[str, Weights]:
    return {"in1k": Weights("aldjalkdf/RAVLT", f"RAVLT_{letter}.pth")}


# Their repository is on the hub, but its authors do not print the names of its files.
MAVIT = {"in1k": Weights(page="https://huggingface.co/aldjalkdf/MAViT/tree/main")}


register(
    __name__,
    {
        "mala_vit_nano": Model(MALA, PYRAMID_NANO),
        "mala_vit_tiny": Model(MALA, PYRAMID_TINY, MAVIT, top1=82.9),
        "mala_vit_small": Model(MALA, PYRAMID_SMALL, MAVIT, top1=84.7),
        "mala_vit_base": Model(MALA, PYRAMID_BASE, MAVIT, top1=85.7),
        "mala_vit_large": Model(MALA, PYRAMID_LARGE | {"head_dim": 2560}, MAVIT, top1=86.0),
        "rala_vit_nano": Model(RALA, PYRAMID_NANO),
        "rala_vit_tiny": Model(RALA, PYRAMID_TINY, _ravlt("T"), top1=82.8, mask_rcnn=(47.3, 42.7)),
        "rala_vit_small": Model(
            RALA, PYRAMID_SMALL, _ravlt("S"), top1=84.4, mask_rcnn=(49.8, 44.6), upernet=50.7
        ),
        "rala_vit_base": Model(
            RALA, PYRAMID_BASE, _ravlt("B"), top1=85.5, mask_rcnn=(51.2, 45.7), upernet=52.5
        ),
        "rala_vit_large": Model(
            RALA, PYRAMID_LARGE, _ravlt("L"), top1=85.8, mask_rcnn=(52.3, 46.4), upernet=53.2
        ),
    },
)
