"""InLine attention in the bodies of DeiT, PVT, Swin and CSwin."""

from ..registry import Model, Weights, register
from . import bodies, papers

# Its authors resize both sides of an image, and do not keep the aspect ratio.
DATA = {"crop_mode": "squash"}
DEIT = bodies.DEIT(paper=papers.INLINE, config={"mixer": "inline"}, data=DATA)
# Its authors' PVT has twice the heads of PVT, and no class token.
PVT = bodies.PVT(
    paper=papers.INLINE,
    data=DATA,
    config={"mixer": "inline", "num_heads": (2, 4, 10, 16)},
)
SWIN = bodies.SWIN(paper=papers.INLINE, data=DATA)
CSWIN = bodies.CSWIN(
    paper=papers.INLINE,
    data=DATA,
    config={
        "mixer": ("inline", "inline", "cross_window", "cross_window"),
        "mixer_options": {
            "inline": {"predict_from": "stream", "local_kernel": 3},
            "cross_window": {"split_size": (1, 2, 7, None)},
        },
    },
)


def _cloud(identifier: str, size: int = 224) -> dict[str, Weights]:
    page = f"https://cloud.tsinghua.edu.cn/f/{identifier}/"
    if size == 224:
        return {"in1k": Weights(page=page)}
    shape = {"input_size": (3, size, size), "pool_size": (size // 16, size // 16)}
    return {f"in1k_{size}": Weights(page=page, config=shape, arguments={"img_size": size})}


# The larger models of Swin and CSwin were published without weights; CSwin-B's top-1 is 85.7.
SWIN_384 = bodies.weights_at(384, arguments={"mixer_options": {"window": {"window_size": 12}}})
CSWIN_384 = bodies.weights_at(
    384,
    crop_pct=0.875,
    arguments={"mixer_options": {"cross_window": {"split_size": (1, 2, 12, None)}}},
)

register(
    __name__,
    {
        "inline_deit_tiny": Model(
            DEIT,
            {"embed_dim": 192, "num_heads": 6},
            _cloud("1d6b8191ad6d4114b291"),
            parameters=6_477_736,
            top1=74.5,
        ),
        "inline_deit_small": Model(
            DEIT,
            {"embed_dim": 320, "num_heads": 10},
            _cloud("2f3898b07e9247f3beb3", 288),
            parameters=16_734_760,
            top1=80.2,
            top1_size=288,
        ),
        "inline_deit_base": Model(
            DEIT,
            {"embed_dim": 384, "num_heads": 12},
            _cloud("10bdd726d4b0435eb34e", 448),
            parameters=23_797_096,
            top1=82.3,
            top1_size=448,
        ),
        "inline_pvt_tiny": Model(
            PVT, bodies.PVT_TINY, _cloud("90ac52b1555b401eb5e6"), parameters=12_032_232, top1=78.2
        ),
        "inline_pvt_small": Model(
            PVT, bodies.PVT_SMALL, _cloud("1ab953b2479d433080a3"), parameters=21_556_136, top1=82.0
        ),
        "inline_pvt_medium": Model(
            PVT, bodies.PVT_MEDIUM, _cloud("a72aec31e6084bc0a280"), parameters=37_618_856, top1=83.2
        ),
        "inline_pvt_large": Model(
            PVT, bodies.PVT_LARGE, _cloud("efd91318ba964f01b288"), parameters=51_154_280, top1=83.6
        ),
        "inline_swin_tiny": Model(
            SWIN,
            bodies.SWIN_TINY | {"mixer": ("inline", "inline", "inline", "window")},
            _cloud("32810869fcc34410966b"),
            parameters=29_223_544,
            top1=82.4,
        ),
        "inline_swin_small": Model(
            SWIN,
            bodies.SWIN_SMALL | {"mixer": ("inline", "inline", "window", "window")},
            _cloud("e9657fd247c04c7cb1a1"),
            parameters=49_793_296,
            top1=83.6,
        ),
        "inline_swin_base": Model(
            SWIN,
            bodies.SWIN_BASE
            | {"mixer": ("inline", "inline", ("inline",) * 2 + ("window",) * 16, "window")},
            _cloud("bf23564bb64c420aafe1") | {"in1k_384": SWIN_384},
            parameters=88_350_120,
            top1=84.1,
        ),
        "inline_cswin_tiny": Model(
            CSWIN,
            bodies.CSWIN_TINY | {"depths": (2, 4, 18, 1)},
            _cloud("49fa2ecc543647c4b970"),
            parameters=20_604_520,
            top1=83.2,
        ),
        "inline_cswin_small": Model(
            CSWIN,
            bodies.CSWIN_SMALL | {"depths": (3, 6, 29, 2)},
            _cloud("59f4e65f776f4052b93c"),
            parameters=33_032_872,
            top1=83.8,
        ),
        "inline_cswin_base": Model(
            CSWIN,
            bodies.CSWIN_BASE | {"depths": (3, 6, 29, 2)},
            _cloud("91e17121df284ae38521") | {"in1k_384": CSWIN_384},
            parameters=73_413_640,
            top1=84.5,
        ),
    },
)
