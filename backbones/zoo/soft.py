"""SOFT and SOFT-Norm: softmax-free attention in a body of post-norm blocks."""

from typing import Any

from ..registry import Model, Weights, register
from . import bodies, papers


def _config(inverse: str, **others: Any) -> dict[str, Any]:
    options = {"landmark_ratio": (8, 4, 2, 1), "local_kernel": (9, 5, 3, 3), "inverse": inverse}
    mixer = ("softmax_free", "softmax_free", "softmax_free", "softmax")
    return {"mixer": mixer, "mixer_options": {"softmax_free": options}} | others


SOFT = bodies.SOFT(paper=papers.SOFT, config=_config("regularized"))
SOFT_NORM = bodies.SOFT(
    paper=papers.SOFT_NORM,
    # The authors replace the blocks of stages 1 to 3 after their initialisation.
    config=_config("normalized", init_std=(None, None, None, 0.02)),
)


def _drive(identifier: str, **arguments: Any) -> Weights:
    return Weights(page=f"https://drive.google.com/file/d/{identifier}/view", arguments=arguments)


# Of November 2021, trained with the inverse of that time.
SOFT_2021 = {
    "in1k_2021": _drive(
        "1S04DCotIOkP0DaBb8WStQ513z82qT9de",
        mixer_options={"softmax_free": {"inverse": "unregularized"}},
    )
}


def _size(depths: tuple[int, ...], width: int = 320, heads: int = 10) -> dict[str, tuple[int, ...]]:
    return {"embed_dim": (64, 128, width, 512), "depths": depths, "num_heads": (2, 4, heads, 16)}


NANO = {"embed_dim": (32, 64, 96, 128), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
TINY = _size((1, 2, 3, 2))
# Depths of the published 24.1 M parameters; the authors' code has (1, 3, 20, 4), 38.9 M.
SMALL = _size((1, 3, 7, 4))
MEDIUM = _size((1, 3, 29, 5), 288, 9)
LARGE = _size((1, 3, 40, 5))
HUGE = _size((1, 5, 49, 5), 352, 11)

register(
    __name__,
    {
        "soft_vit_nano": Model(SOFT, NANO),
        "soft_vit_tiny": Model(SOFT, TINY, SOFT_2021, parameters=13_069_056, top1=79.3),
        "soft_vit_small": Model(SOFT, SMALL, parameters=24_110_092, top1=82.2),
        "soft_vit_medium": Model(SOFT, MEDIUM, parameters=45_812_707, top1=82.9),
        "soft_vit_large": Model(SOFT, LARGE, parameters=64_700_646, top1=83.1),
        "soft_vit_huge": Model(SOFT, HUGE, parameters=87_108_273, top1=83.3),
        "soft_norm_vit_tiny": Model(
            SOFT_NORM,
            TINY,
            {"in1k": _drive("1Isy5b9v_4pyIXDqhKPNRq3WKH0etDlfl")},
            parameters=13_069_056,
            top1=79.4,
            mask_rcnn=(41.2, 38.2),
        ),
        "soft_norm_vit_small": Model(
            SOFT_NORM,
            SMALL,
            {"in1k": _drive("1OBjn7FzVdNP1Urqxq7X0yDykyPhxAAW1")},
            parameters=24_110_092,
            top1=82.4,
            mask_rcnn=(43.8, 40.1),
            upernet=46.2,
        ),
        "soft_norm_vit_medium": Model(
            SOFT_NORM,
            MEDIUM,
            {"in1k": _drive("1K2C6daaJn3jwurWh38uvV7rexirWjuzh")},
            parameters=45_812_707,
            top1=83.1,
            mask_rcnn=(46.6, 42.0),
            upernet=48.0,
        ),
        "soft_norm_vit_large": Model(
            SOFT_NORM,
            LARGE,
            {"in1k": _drive("1aRYuF_gbBGyiXUDKEcpHJmM04SdvTUdP")},
            parameters=64_700_646,
            top1=83.3,
            mask_rcnn=(47.0, 42.2),
        ),
        "soft_norm_vit_huge": Model(SOFT_NORM, HUGE, parameters=87_108_273, top1=83.4),
    },
)
