"""Agent attention in the bodies of DeiT, PVT, Swin and CSwin."""

from ..registry import Model, Weights, register
from . import bodies, papers

DEIT = bodies.DEIT(paper=papers.AGENT, config={"mixer": "agent"})
PVT = bodies.PVT(
    paper=papers.AGENT,
    config={"mixer": "agent", "mixer_options": {"agent": {"agents": (9, 16, 49, 49)}}},
)
SWIN = bodies.SWIN(
    paper=papers.AGENT,
    config={"mixer_options": {"agent": {"agents": (9, 16, 49, 49)}}},
)
CSWIN = bodies.CSWIN(
    paper=papers.AGENT,
    config={
        "mixer": ("agent", "agent", "cross_window", "cross_window"),
        "mixer_options": {
            "agent": {"agents": (9, 16, 49, 49)},
            "cross_window": {"split_size": (1, 2, 7, None)},
        },
    },
)

register(
    __name__,
    {
        "agent_deit_tiny": Model(
            DEIT,
            bodies.DEIT_TINY,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/57e0904221824ee7b7af/")},
            parameters=6_015_640,
            top1=74.9,
        ),
        "agent_deit_small": Model(
            DEIT,
            bodies.DEIT_SMALL,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/fdd43304372541db8ea7/")},
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
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/5115f15fdd7e4ab58fbc/")},
            parameters=87_204_904,
            top1=82.0,
        ),
        "agent_pvt_tiny": Model(
            PVT,
            bodies.PVT_TINY,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/13fdf0e0a7c5498c934f/")},
            parameters=11_570_352,
            top1=78.4,
            mask_rcnn=(41.4, 38.7),
        ),
        "agent_pvt_small": Model(
            PVT,
            bodies.PVT_SMALL,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/36b8be9a8863456685a3/")},
            parameters=20_635_066,
            top1=82.2,
            mask_rcnn=(44.5, 41.2),
        ),
        "agent_pvt_medium": Model(
            PVT,
            bodies.PVT_MEDIUM,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/4d00ecacf18b45f9b88c/")},
            parameters=35_921_746,
            top1=83.4,
            mask_rcnn=(45.9, 42.0),
        ),
        "agent_pvt_large": Model(
            PVT,
            bodies.PVT_LARGE,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/040cfe0cfbbe4762ad09/")},
            parameters=48_738_180,
            top1=83.7,
            mask_rcnn=(46.9, 42.8),
        ),
        "agent_swin_tiny": Model(
            SWIN,
            bodies.SWIN_TINY | {"mixer": ("agent", "agent", "agent", "window")},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/a2ddc1190c224f768a41/")},
            parameters=28_902_964,
            top1=82.6,
            mask_rcnn=(44.6, 40.7),
            upernet=46.68,
        ),
        "agent_swin_small": Model(
            SWIN,
            bodies.SWIN_SMALL | {"mixer": ("agent", "agent", "window", "window")},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/f607172c9fea4d6e99bb/")},
            parameters=49_666_684,
            top1=83.7,
            mask_rcnn=(47.2, 42.7),
            upernet=48.08,
        ),
        "agent_swin_base": Model(
            SWIN,
            bodies.SWIN_BASE
            | {"mixer": ("agent", "agent", ("agent",) * 2 + ("window",) * 16, "window")},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/4fcd2d0114bb490483c3/")},
            parameters=88_095_096,
            top1=84.0,
            upernet=48.73,
        ),
        "agent_cswin_tiny": Model(
            CSWIN,
            bodies.CSWIN_TINY | {"depths": (2, 4, 18, 1)},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/8c562a74441e46d5902b/")},
            parameters=20_458_672,
            top1=83.1,
        ),
        "agent_cswin_small": Model(
            CSWIN,
            bodies.CSWIN_SMALL | {"depths": (3, 6, 29, 2)},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/30eb8af675bc4b7a8747/")},
            parameters=32_814_100,
            top1=83.9,
        ),
        "agent_cswin_base": Model(
            CSWIN,
            bodies.CSWIN_BASE | {"depths": (3, 6, 29, 2)},
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/c8035b0839b2410c8c9f/")},
            parameters=73_249_696,
            top1=84.7,
        ),
    },
)
