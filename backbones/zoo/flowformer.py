"""Flowformer: flow attention in a body of its own."""

from ..registry import Family, Model, Weights, register
from ..skeletons import flowformer
from . import papers

FLOWFORMER = Family(
    skeleton=flowformer.Flowformer,
    filter_fn=flowformer.checkpoint_filter_fn,
    paper=papers.FLOWFORMER,
    first_conv="stem.proj",
    classifier="head.fc",
    config={"mixer": "flow"},
)

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
