"""Swin, and other mixers in its skeleton."""

from ..registry import Family, Model, register
from ..skeletons import swin
from ..skeletons.swin import SwinTransformer

SOFTMAX = Family(
    skeleton=SwinTransformer,
    filter_fn=swin.checkpoint_filter_fn,
    paper="arXiv:2103.14030",
    origin="https://github.com/microsoft/Swin-Transformer",
    first_conv="patch_embed.proj",
    classifier="head.fc",
    # timm's order of shift and padding, which matters for a map that is no multiple of 7.
    config={"mixer": "window", "mixer_options": {"window": {"padding": "end_after_shift"}}},
)

TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}

register(
    __name__,
    {
        "softmax_swin_tiny": Model(SOFTMAX, TINY, top1=81.2),
        "softmax_swin_small": Model(SOFTMAX, SMALL, top1=83.2),
        "softmax_swin_base": Model(SOFTMAX, BASE, top1=83.5),
    },
)
