"""Agent attention in the bodies of DeiT, PVT, Swin and CSwin."""

from ..registry import Model, Weights, register
from . import bodies, papers

# Its authors resize both sides of an image, and do not keep the aspect ratio.
DATA = {"crop_mode": "squash"}
DEIT = bodies.DEIT(paper=papers.AGENT, config={"mixer": "agent"}, data=DATA)
PVT = bodies.PVT(
    paper=papers.AGENT,
    data=DATA,
    config={"mixer": "agent", "mixer_options": {"agent": {"agents": (9, 16, 49, 49)}}},
)
SWIN = bodies.SWIN(
    paper=papers.AGENT,
    data=DATA,
    config={"mixer_options": {"agent": {"agents": (9, 16, 49, 49)}}},
)
CSWIN = bodies.CSWIN(
    paper=papers.AGENT,
    data=DATA,
    config={
        "mixer": ("agent", "agent", "cross_window", "cross_window"),
        "mixer_options": {
            "agent": {"agents": (9, 16, 49, 49)},
            "cross_window": {"split_size": (1, 2, 7, None)},
        },
    },
)


def _cloud(identifier: str, **larger: Weights) -> dict[str, Weights]:
    return {"in1k": Weights(page=_page(identifier))} | larger


def _page(identifier: str) -> str:
    return f"https://cloud.tsinghua.edu.cn/f/{identifier}/"


register(
    __name__,
    {
        "agent_deit_tiny": Model(
            DEIT,
            bodies.DEIT_TINY,
            _cloud("57e0904221824ee7b7af"),
            parameters=6_015_640,
            top1=74.9,
        ),
        "agent_deit_small": Model(
            DEIT,
            bodies.DEIT_SMALL,
            _cloud(
                "fdd43304372541db8ea7",
                in1k_448=bodies.weights_at(
                    448, page=_page("a228f86241c445f1969b"), pool_size=(28, 28), crop_pct=0.875
                ),
            ),
            parameters=22_647_112,
            top1=80.5,
        ),
        "agent_deit_base": Model(
            DEIT,
            bodies.DEIT_BASE
            | {
                "mixer": (("agent",) * 4 + ("softmax",) * 8,),
                "mixer_options": {"agent": {"agents": 81}},
            },
            _cloud("5115f15fdd7e4ab58fbc"),
            parameters=87_204_904,
            top1=82.0,
        ),
        "agent_pvt_tiny": Model(
            PVT,
            bodies.PVT_TINY,
            _cloud("13fdf0e0a7c5498c934f"),
            parameters=11_570_352,
            top1=78.4,
            mask_rcnn=(41.4, 38.7),
        ),
        "agent_pvt_small": Model(
            PVT,
            bodies.PVT_SMALL,
            _cloud("36b8be9a8863456685a3"),
            parameters=20_635_066,
            top1=82.2,
            mask_rcnn=(44.5, 41.2),
        ),
        "agent_pvt_medium": Model(
            PVT,
            bodies.PVT_MEDIUM,
            _cloud(
                "4d00ecacf18b45f9b88c",
                in1k_256=bodies.weights_at(256, page=_page("654df734121643b19c52"), crop_pct=0.875),
            ),
            parameters=35_921_746,
            top1=83.4,
            mask_rcnn=(45.9, 42.0),
        ),
        "agent_pvt_large": Model(
            PVT,
            bodies.PVT_LARGE,
            _cloud("040cfe0cfbbe4762ad09"),
            parameters=48_738_180,
            top1=83.7,
            mask_rcnn=(46.9, 42.8),
        ),
        "agent_swin_tiny": Model(
            SWIN,
            bodies.SWIN_TINY | {"mixer": ("agent", "agent", "agent", "window")},
            _cloud("a2ddc1190c224f768a41"),
            parameters=28_902_964,
            top1=82.6,
            mask_rcnn=(44.6, 40.7),
            upernet=46.68,
        ),
        "agent_swin_small": Model(
            SWIN,
            bodies.SWIN_SMALL | {"mixer": ("agent", "agent", "window", "window")},
            _cloud(
                "f607172c9fea4d6e99bb",
                in1k_288=bodies.weights_at(
                    288,
                    page=_page("09760394e93b4046a25e"),
                    arguments={"mixer_options": {"window": {"window_size": 9}}},
                ),
            ),
            parameters=49_666_684,
            top1=83.7,
            mask_rcnn=(47.2, 42.7),
            upernet=48.08,
        ),
        "agent_swin_base": Model(
            SWIN,
            bodies.SWIN_BASE
            | {"mixer": ("agent", "agent", ("agent",) * 2 + ("window",) * 16, "window")},
            _cloud(
                "4fcd2d0114bb490483c3",
                in1k_384=bodies.weights_at(
                    384,
                    page=_page("bb84ee9058954706a557"),
                    arguments={"mixer_options": {"window": {"window_size": 12}}},
                ),
            ),
            parameters=88_095_096,
            top1=84.0,
            upernet=48.73,
        ),
        "agent_cswin_tiny": Model(
            CSWIN,
            bodies.CSWIN_TINY | {"depths": (2, 4, 18, 1)},
            _cloud("8c562a74441e46d5902b"),
            parameters=20_458_672,
            top1=83.1,
        ),
        "agent_cswin_small": Model(
            CSWIN,
            bodies.CSWIN_SMALL | {"depths": (3, 6, 29, 2)},
            _cloud("30eb8af675bc4b7a8747"),
            parameters=32_814_100,
            top1=83.9,
        ),
        "agent_cswin_base": Model(
            CSWIN,
            bodies.CSWIN_BASE | {"depths": (3, 6, 29, 2)},
            _cloud(
                "c8035b0839b2410c8c9f",
                in1k_384=bodies.weights_at(
                    384,
                    page=_page("1239be0df44b47719432"),
                    crop_pct=0.875,
                    arguments={"mixer_options": {"cross_window": {"split_size": (1, 2, 12, None)}}},
                ),
            ),
            parameters=73_249_696,
            top1=84.7,
        ),
    },
)
