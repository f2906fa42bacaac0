"""Flowformer: flow attention in a body of its own."""

from ..registry import Model, Weights, register
from . import bodies, papers

FLOWFORMER = bodies.FLOWFORMER(paper=papers.FLOWFORMER, config={"mixer": "flow"})

CLOUD = "https://cloud.tsinghua.edu.cn/d/82d93375f97f4ca58886/"

register(
    __name__,
    {
        "flowformer_19": Model(
            FLOWFORMER,
            {"embed_dim": 96, "depths": (3, 3, 10, 3), "num_heads": (12, 12, 12, 12)},
            {"in1k": Weights(page=CLOUD)},
            parameters=43_311_304,
            top1=80.6,
        ),
    },
)
