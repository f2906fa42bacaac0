"""FLatten: focused linear attention in the bodies of PVT, PVTv2, Swin and CSwin."""

from ..registry import Model, Weights, register
from . import bodies, papers

# The authors resize images to a square before they crop them.
DATA = {"crop_mode": "squash"}
PVT = bodies.PVT(paper=papers.FLATTEN, config={"mixer": "flatten", "unused_norm": True}, data=DATA)
PVTV2 = bodies.PVTV2(paper=papers.FLATTEN, config={"mixer": "flatten"}, data=DATA)
SWIN = bodies.SWIN(
    paper=papers.FLATTEN,
    config={"mixer": ("flatten", "flatten", "window", "window")},
    data=DATA,
)
CSWIN = bodies.CSWIN(
    paper=papers.FLATTEN,
    config={
        "mixer": ("flatten", "flatten", "cross_window", "cross_window"),
        "mixer_options": {
            "flatten": {"channel_kernel": 3},
            "cross_window": {"split_size": (1, 2, 7, None)},
        },
    },
    data=DATA,
)


def _page(identifier: str) -> str:
    return f"https://cloud.tsinghua.edu.cn/f/{identifier}/"


def _cloud(identifier: str) -> Weights:
    return Weights(page=_page(identifier))


register(
    __name__,
    {
        "flatten_pvt_tiny": Model(
            PVT,
            bodies.PVT_TINY,
            {"in1k": _cloud("3ab1d773f19d45648690")},
            parameters=12_150_504,
            top1=77.8,
            mask_rcnn=(38.2, 37.0),
        ),
        "flatten_pvt_small": Model(PVT, bodies.PVT_SMALL, parameters=21_670_248, top1=81.7),
        "flatten_pvt_medium": Model(PVT, bodies.PVT_MEDIUM, parameters=37_242_216),
        "flatten_pvt_large": Model(PVT, bodies.PVT_LARGE, parameters=50_649_192),
        "flatten_pvtv2_b0": Model(
            PVTV2,
            bodies.PVTV2_B0,
            {"in1k": _cloud("5d1f01532b104da28e7b")},
            parameters=3_594_824,
            top1=71.1,
        ),
        "flatten_pvtv2_b1": Model(PVTV2, bodies.PVTV2_B1, parameters=12_931_240, top1=79.5),
        "flatten_pvtv2_b2": Model(PVTV2, bodies.PVTV2_B2, parameters=22_548_264, top1=82.5),
        "flatten_pvtv2_b3": Model(PVTV2, bodies.PVTV2_B3, parameters=38_273_832),
        "flatten_pvtv2_b4": Model(PVTV2, bodies.PVTV2_B4, parameters=51_836_968),
        "flatten_swin_tiny": Model(
            SWIN,
            bodies.SWIN_TINY,
            {"in1k": _cloud("e1518e76703e4e57a7f2")},
            parameters=29_192_384,
            top1=82.1,
            mask_rcnn=(44.2, 40.2),
            upernet=44.82,
        ),
        "flatten_swin_small": Model(
            SWIN,
            bodies.SWIN_SMALL,
            {"in1k": _cloud("94188e52af354bf4a88b")},
            parameters=50_510_288,
            top1=83.5,
            upernet=48.14,
        ),
        "flatten_swin_base": Model(
            SWIN,
            bodies.SWIN_BASE,
            {
                "in1k": _cloud("7a9e5186bad04e7fb3a9"),
                "in1k_384": bodies.weights_at(
                    384,
                    page=_page("0d0330cf2e5249f1abb6"),
                    arguments={"mixer_options": {"window": {"window_size": 12}}},
                ),
            },
            parameters=88_972_488,
            top1=83.8,
        ),
        "flatten_cswin_tiny": Model(
            CSWIN,
            bodies.CSWIN_TINY | {"depths": (2, 4, 18, 1)},
            {"in1k": _cloud("48ba765ba8b0451d9d5a")},
            parameters=21_201_768,
            top1=83.1,
        ),
        "flatten_cswin_small": Model(CSWIN, bodies.CSWIN_SMALL, parameters=35_451_752, top1=83.8),
        "flatten_cswin_base": Model(
            CSWIN,
            bodies.CSWIN_BASE | {"depths": (3, 6, 29, 2)},
            # Its top-1 is 85.5.
            {
                "in1k_384": bodies.weights_at(
                    384,
                    crop_pct=0.875,
                    arguments={"mixer_options": {"cross_window": {"split_size": (1, 2, 12, None)}}},
                )
            },
            parameters=74_867_032,
            top1=84.5,
        ),
    },
)
