"""CSwin, and other mixers in its skeleton."""

from ..registry import Family, Model, register
from ..skeletons import cswin
from ..skeletons.cswin import CSwinTransformer

SOFTMAX = Family(
    skeleton=CSwinTransformer,
    filter_fn=cswin.checkpoint_filter_fn,
    paper="arXiv:2107.00652",
    origin="https://github.com/microsoft/CSWin-Transformer",
    first_conv="patch_embed.proj",
    classifier="head.fc",
    config={
        "mixer": "cross_window",
        "mixer_options": {"cross_window": {"split_size": (1, 2, 7, None)}},
    },
)

TINY = {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16)}
SMALL = {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)}
BASE = {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32)}
LARGE = {"embed_dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24)}

register(
    __name__,
    {
        "softmax_cswin_tiny": Model(SOFTMAX, TINY, top1=82.8),
        "softmax_cswin_small": Model(SOFTMAX, SMALL, top1=83.6),
        "softmax_cswin_base": Model(SOFTMAX, BASE, top1=84.2),
        "softmax_cswin_large": Model(SOFTMAX, LARGE, top1=86.5),
    },
)
