"""PolaFormer: polarity-aware linear attention in the bodies of PVT and Swin."""

from ..registry import Model, Weights, register
from . import bodies, papers

# The authors resize images to a square before they crop them.
DATA = {"crop_mode": "squash"}
PVT = bodies.PVT(
    paper=papers.POLAFORMER, config={"mixer": "polarity", "unused_norm": True}, data=DATA
)
SWIN = bodies.SWIN(
    paper=papers.POLAFORMER,
    config={"mixer": ("polarity", "polarity", "window", "window")},
    data=DATA,
)
PAGE = Weights(page="https://huggingface.co/ZachMeng/PolaFormer")
# Swin-B at 384 px is in the authors' configurations, without weights.
SWIN_384 = bodies.weights_at(384, arguments={"mixer_options": {"window": {"window_size": 12}}})

register(
    __name__,
    {
        "pola_pvt_tiny": Model(
            PVT, bodies.PVT_TINY, {"in1k": PAGE}, parameters=12_924_648, top1=78.8
        ),
        "pola_pvt_small": Model(
            PVT, bodies.PVT_SMALL, {"in1k": PAGE}, parameters=23_157_224, top1=81.9
        ),
        "pola_pvt_medium": Model(PVT, bodies.PVT_MEDIUM, parameters=39_965_672),
        "pola_pvt_large": Model(PVT, bodies.PVT_LARGE, parameters=54_366_568),
        "pola_swin_tiny": Model(
            SWIN, bodies.SWIN_TINY, {"in1k": PAGE}, parameters=29_285_696, top1=82.6
        ),
        "pola_swin_small": Model(
            SWIN, bodies.SWIN_SMALL, {"in1k": PAGE}, parameters=50_603_600, top1=83.6
        ),
        "pola_swin_base": Model(
            SWIN,
            bodies.SWIN_BASE,
            {"in1k": PAGE, "in1k_384": SWIN_384},
            parameters=89_137_864,
            top1=83.8,
        ),
    },
)
