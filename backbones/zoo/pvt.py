"""The Pyramid Vision Transformer, and agent attention in it."""

from dataclasses import replace

from ..registry import Family, Model, Weights, register
from ..skeletons import pvt
from ..skeletons.pvt import PyramidVisionTransformerV1
from . import papers

SOFTMAX = Family(
    skeleton=PyramidVisionTransformerV1,
    filter_fn=pvt.checkpoint_filter_fn,
    paper=papers.PVT,
    first_conv="stem.proj",
    classifier="head.fc",
    config={
        "mixer": ("spatial_reduction", "spatial_reduction", "spatial_reduction", "softmax"),
        "mixer_options": {"spatial_reduction": {"reduction": (8, 4, 2, 1)}},
        "class_token": True,
    },
)

AGENT = replace(
    SOFTMAX,
    paper=papers.AGENT,
    config={"mixer": "agent", "mixer_options": {"agent": {"agents": (9, 16, 49, 49)}}},
)

TINY = {"depths": (2, 2, 2, 2)}
SMALL = {"depths": (3, 4, 6, 3)}
MEDIUM = {"depths": (3, 4, 18, 3)}
LARGE = {"depths": (3, 8, 27, 3)}


def _pvt(size: str) -> dict[str, Weights]:
    releases = "https://github.com/whai362/PVT/releases/download/v2"
    return {"in1k": Weights(url=f"{releases}/pvt_{size}.pth")}


register(
    __name__,
    {
        "softmax_pvt_tiny": Model(SOFTMAX, TINY, _pvt("tiny"), top1=75.1),
        "softmax_pvt_small": Model(SOFTMAX, SMALL, _pvt("small"), top1=79.8),
        "softmax_pvt_medium": Model(SOFTMAX, MEDIUM, _pvt("medium"), top1=81.2),
        "softmax_pvt_large": Model(SOFTMAX, LARGE, _pvt("large"), top1=81.7),
        "agent_pvt_tiny": Model(
            AGENT,
            TINY,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/13fdf0e0a7c5498c934f/")},
            top1=78.4,
            mask_rcnn=(41.4, 38.7),
        ),
        "agent_pvt_small": Model(
            AGENT,
            SMALL,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/36b8be9a8863456685a3/")},
            top1=82.2,
            mask_rcnn=(44.5, 41.2),
        ),
        "agent_pvt_medium": Model(
            AGENT,
            MEDIUM,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/4d00ecacf18b45f9b88c/")},
            top1=83.4,
            mask_rcnn=(45.9, 42.0),
        ),
        "agent_pvt_large": Model(
            AGENT,
            LARGE,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/040cfe0cfbbe4762ad09/")},
            top1=83.7,
            mask_rcnn=(46.9, 42.8),
        ),
    },
)
