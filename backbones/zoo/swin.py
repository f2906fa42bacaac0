"""Swin, and other mixers in its skeleton."""

from dataclasses import replace

from ..registry import Family, Model, Weights, register
from ..skeletons import swin
from ..skeletons.swin import SwinTransformer
from . import papers

SOFTMAX = Family(
    skeleton=SwinTransformer,
    filter_fn=swin.checkpoint_filter_fn,
    paper=papers.SWIN,
    first_conv="stem.proj",
    classifier="head.fc",
    # timm's order of shift and padding, which matters for a map that is no multiple of 7.
    config={"mixer": "window", "mixer_options": {"window": {"padding": "end_after_shift"}}},
)

AGENT = replace(
    SOFTMAX,
    paper=papers.AGENT,
    config={"mixer_options": {"agent": {"agents": (9, 16, 49, 49)}}},
)

TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


def _swin(size: str) -> dict[str, Weights]:
    release = "https://github.com/SwinTransformer/storage/releases/download"
    file = f"swin_{size}_patch4_window7_224"
    finetuned = {
        "tiny": f"v1.0.8/{file}_22kto1k_finetune.pth",
        "small": f"v1.0.8/{file}_22kto1k_finetune.pth",
        "base": f"v1.0.0/{file}_22kto1k.pth",
    }
    return {
        "ms_in1k": Weights(url=f"{release}/v1.0.0/{file}.pth"),
        "ms_in22k_ft_in1k": Weights(url=f"{release}/{finetuned[size]}"),
    }


register(
    __name__,
    {
        "softmax_swin_tiny": Model(SOFTMAX, TINY, _swin("tiny"), top1=81.2, upernet=44.51),
        "softmax_swin_small": Model(SOFTMAX, SMALL, _swin("small"), top1=83.2, upernet=47.64),
        "softmax_swin_base": Model(SOFTMAX, BASE, _swin("base"), top1=83.5, upernet=48.13),
        "agent_swin_tiny": Model(
            AGENT,
            TINY | {"mixer": ("agent", "agent", "agent", "window")},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/a2ddc1190c224f768a41/")},
            top1=82.6,
            mask_rcnn=(44.6, 40.7),
            upernet=46.68,
        ),
        "agent_swin_small": Model(
            AGENT,
            SMALL | {"mixer": ("agent", "agent", "window", "window")},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/f607172c9fea4d6e99bb/")},
            top1=83.7,
            mask_rcnn=(47.2, 42.7),
            upernet=48.08,
        ),
        "agent_swin_base": Model(
            AGENT,
            BASE | {"mixer": ("agent", "agent", ("agent",) * 2 + ("window",) * 16, "window")},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/4fcd2d0114bb490483c3/")},
            top1=84.0,
            upernet=48.73,
        ),
    },
)
