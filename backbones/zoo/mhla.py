"""MHLA in the body of DeiT: no weights and no results of these classifiers are published."""

from ..registry import Model, register
from ..skeletons import pooled_vit
from . import bodies, papers

DEIT = bodies.DEIT(
    skeleton=pooled_vit.PooledVisionTransformer,
    paper=papers.MHLA,
    config={"mixer": "mhla", "img_size": 256},
)

register(
    __name__,
    {
        "mhla_deit_tiny": Model(DEIT, bodies.DEIT_TINY, parameters=5_793_832),
        "mhla_deit_small": Model(DEIT, bodies.DEIT_SMALL, parameters=22_200_424),
        "mhla_deit_base": Model(DEIT, bodies.DEIT_BASE, parameters=86_864_104),
    },
)
