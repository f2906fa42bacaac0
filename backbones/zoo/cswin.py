"""CSwin, and other mixers in its skeleton."""

from dataclasses import replace

from ..registry import Family, Model, Weights, register
from ..skeletons import cswin
from ..skeletons.cswin import CSwinTransformer
from . import papers

SOFTMAX = Family(
    skeleton=CSwinTransformer,
    filter_fn=cswin.checkpoint_filter_fn,
    paper=papers.CSWIN,
    first_conv="stem.proj",
    classifier="head.fc",
    config={
        "mixer": "cross_window",
        "mixer_options": {"cross_window": {"split_size": (1, 2, 7, None)}},
    },
)

AGENT = replace(
    SOFTMAX,
    paper=papers.AGENT,
    config={
        "mixer": ("agent", "agent", "cross_window", "cross_window"),
        "mixer_options": {
            "agent": {"agents": (9, 16, 49, 49)},
            "cross_window": {"split_size": (1, 2, 7, None)},
        },
    },
)

TINY = {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16)}
SMALL = {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)}
BASE = {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32)}
LARGE = {"embed_dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24)}


def _cswin(size: str) -> dict[str, Weights]:
    release = "https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0"
    tag = "ms_in22k_ft_in1k" if size == "large" else "ms_in1k"
    return {tag: Weights(url=f"{release}/cswin_{size}_224.pth", config={"crop_pct": 0.9})}


register(
    __name__,
    {
        "softmax_cswin_tiny": Model(SOFTMAX, TINY, _cswin("tiny"), top1=82.8),
        "softmax_cswin_small": Model(SOFTMAX, SMALL, _cswin("small"), top1=83.6),
        "softmax_cswin_base": Model(SOFTMAX, BASE, _cswin("base"), top1=84.2),
        "softmax_cswin_large": Model(SOFTMAX, LARGE, _cswin("large"), top1=86.5),
        "agent_cswin_tiny": Model(
            AGENT,
            TINY | {"depths": (2, 4, 18, 1)},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/8c562a74441e46d5902b/")},
            top1=83.1,
        ),
        "agent_cswin_small": Model(
            AGENT,
            SMALL | {"depths": (3, 6, 29, 2)},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/30eb8af675bc4b7a8747/")},
            top1=83.9,
        ),
        "agent_cswin_base": Model(
            AGENT,
            BASE | {"depths": (3, 6, 29, 2)},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/c8035b0839b2410c8c9f/")},
            top1=84.7,
        ),
    },
)
