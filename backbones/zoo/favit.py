"""FaViT: factorised attention in the body of PVTv2. No weights are published."""

from ..registry import Model, register
from . import bodies, papers

FAVIT = bodies.PVTV2(
    paper=papers.FAVIT,
    config={
        "mixer": "factorized",
        "mixer_options": {"factorized": {"reduction": (8, 4, 2, 1)}},
        "num_heads": (1, 2, 4, 8),
        "mlp_ratios": (8, 6, 4, 4),
    },
)

register(
    __name__,
    {
        "favit_b0": Model(
            FAVIT,
            {"embed_dim": (32, 64, 128, 256), "depths": (2, 2, 6, 2)},
            parameters=3_427_704,
            top1=71.5,
        ),
        "favit_b1": Model(
            FAVIT,
            {"embed_dim": (64, 128, 256, 512), "depths": (2, 2, 6, 2)},
            parameters=12_958_568,
            top1=79.4,
        ),
        "favit_b2": Model(
            FAVIT,
            {"embed_dim": (64, 128, 256, 512), "depths": (2, 3, 18, 3)},
            parameters=24_919_896,
            top1=82.3,
        ),
        "favit_b3": Model(
            FAVIT,
            {"embed_dim": (96, 192, 384, 768), "depths": (2, 3, 14, 3)},
            parameters=48_746_440,
            top1=83.4,
        ),
    },
)
