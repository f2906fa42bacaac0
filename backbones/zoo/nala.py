"""NaLaFormer: norm-aware linear attention in the body of RAVLT."""

from ..registry import Model, register
from . import bodies, papers

NALA = bodies.RAVLT(
    paper=papers.NALA,
    config={
        "mixer": ("nala", "nala", "nala_softmax", "nala_softmax"),
        "block": "double_position",
        "init_std": None,
    },
)
XTINY = {"embed_dim": (32, 64, 128, 384), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 12)}

register(
    __name__,
    {
        # The paper gives 8 million parameters; its authors' code has these.
        "nala_vit_xtiny": Model(NALA, XTINY, parameters=6_142_248, top1=79.1),
        "nala_vit_tiny": Model(
            NALA, bodies.RAVLT_TINY | {"mlp_ratio": 4.0}, parameters=15_907_752, top1=82.6
        ),
        "nala_vit_small": Model(NALA, bodies.RAVLT_SMALL, parameters=25_654_184, top1=84.3),
        "nala_vit_base": Model(
            NALA, bodies.RAVLT_BASE | {"mlp_ratio": 4.0}, parameters=52_002_952, top1=85.2
        ),
        "nala_vit_large": Model(NALA, bodies.RAVLT_LARGE, parameters=95_426_760, top1=85.7),
    },
)
XTINY = {"embed_dim": (32, 64, 128, 384), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 12)}

register(
    __name__,
    {
        # The paper gives 8 million parameters; its authors' code has these.
        "nala_vit_xtiny": Model(NALA, XTINY, parameters=6_142_248, top1=79.1),
        "nala_vit_tiny": Model(NALA, bodies.RAVLT_TINY | {"mlp_ratio": 4.0}, top1=82.6),
        "nala_vit_small": Model(NALA, bodies.RAVLT_SMALL, top1=84.3),
        "nala_vit_base": Model(NALA, bodies.RAVLT_BASE | {"mlp_ratio": 4.0}, top1=85.2),
        "nala_vit_large": Model(NALA, bodies.RAVLT_LARGE, top1=85.7),
    },
)
