"""CARE: decoupled linear attention in a body of its own."""

from ..registry import Family, Model, Weights, register
from ..skeletons import care
from . import papers

CARE = Family(
    skeleton=care.Care,
    filter_fn=care.checkpoint_filter_fn,
    paper=papers.CARE,
    first_conv="stem.conv",
    classifier=("head.fc", "head.fc_dist"),
    config={"mixer": "care"},
)

DRIVE = "https://drive.google.com/drive/folders"
IN1K = {"in1k": Weights(page=f"{DRIVE}/1UGRHQKjBGY8EjUtsHLsy9VBXp7rfUqkf")}


def _ratios(*ratios: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """The options of the mixer: the interaction's ratios, and strips in the first two stages."""
    return {"care": {"ratio": ratios, "strip": (11, 11, 0, 0)}}


register(
    __name__,
    {
        "care_s0": Model(
            CARE,
            {
                "depths": (2, 4, 8, 4),
                "num_heads": (1, 1, 2, 2),
                "mlp_ratios": (2, 4, 4, 4),
                "mixer_options": _ratios(2, 2, 4, 4),
            },
            IN1K,
            parameters=7_340_000,
            top1=78.4,
        ),
        "care_s1": Model(
            CARE,
            {
                "depths": (3, 6, 10, 6),
                "num_heads": (1, 1, 2, 2),
                "mlp_ratios": (4, 4, 4, 4),
                "mixer_options": _ratios(2, 2, 4, 4),
            },
            IN1K,
            parameters=9_602_424,
            top1=80.1,
        ),
        "care_s2": Model(
            CARE,
            {
                "embed_dim": (32, 64, 192, 384),
                "depths": (3, 6, 10, 6),
                "num_heads": (1, 1, 3, 3),
                "mlp_ratios": (4, 4, 4, 4),
                "mixer_options": _ratios(4, 4, 4, 4),
            },
            IN1K,
            parameters=19_481_288,
            top1=82.1,
        ),
    },
)
