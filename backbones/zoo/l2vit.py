"""L2ViT: windows of softmax attention and linear attention over all tokens, block by block."""

from ..blocks import Alternate
from ..registry import Family, Model, Weights, register
from ..skeletons import l2vit
from . import bodies, papers

L2VIT = Family(
    skeleton=l2vit.L2ViT,
    filter_fn=l2vit.checkpoint_filter_fn,
    paper=papers.L2VIT,
    first_conv="stem.conv1.conv",
    classifier="head.fc",
    config={"mixer": Alternate(("local_window", "linear_global"))},
)


RELEASE = "https://github.com/ChuanyangZheng/L2ViT/releases"


def _in1k(size: str) -> dict[str, Weights]:
    file = f"L2ViT-{size}-checkpoint-best-ema.pth"
    return {"in1k": Weights(url=f"{RELEASE}/download/v1.0/{file}")}


# Pretrained on ImageNet-22k; their top-1 is 86.0 at 224 px and 87.0 at 384 px.
BASE_22K = {
    "in22k_ft_in1k": Weights(page=f"{RELEASE}/tag/v1.0"),
    "in22k_ft_in1k_384": Weights(
        page=f"{RELEASE}/tag/v1.0",
        config={
            "input_size": (3, 384, 384),
            "pool_size": (12, 12),
            "crop_pct": 1.0,
            "crop_mode": "squash",
        },
        arguments={"img_size": 384, "mixer_options": {"local_window": {"window_size": 12}}},
    ),
}

register(
    __name__,
    {
        "l2vit_tiny": Model(
            L2VIT, bodies.SWIN_TINY, _in1k("Tiny"), parameters=28_596_781, top1=83.1
        ),
        "l2vit_small": Model(
            L2VIT, bodies.SWIN_SMALL, _in1k("Small"), parameters=50_199_157, top1=84.1
        ),
        "l2vit_base": Model(
            L2VIT, bodies.SWIN_BASE, _in1k("Base") | BASE_22K, parameters=88_577_188, top1=84.4
        ),
    },
)
