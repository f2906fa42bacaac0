"""SLAB and PRepBN: simplified linear attention, or softmax, and norms that become batch norms."""

from functools import partial

from ..norms import PRepBN
from ..registry import Model, Weights, register
from . import bodies, papers

# The authors' Swin and CSwin have this epsilon in their layer norms, their DeiT and PVT 1e-6.
SWIN_NORM = partial(PRepBN, eps=1e-5)

DEIT = bodies.DEIT(
    paper=papers.SLAB,
    config={"mixer": "slab", "norm_layer": "prepbn", "class_token": "unused"},
)
PVT = bodies.PVT(paper=papers.SLAB, config={"mixer": "slab", "norm_layer": "prepbn"})
PVTV2 = bodies.PVTV2(paper=papers.SLAB, config={"mixer": "slab", "norm_layer": "prepbn"})
SWIN = bodies.SWIN(
    paper=papers.SLAB,
    config={"mixer": ("slab", "slab", "window", "window"), "norm_layer": SWIN_NORM},
)
CSWIN = bodies.CSWIN(
    paper=papers.SLAB,
    config={
        "mixer": ("slab", "slab", "cross_window", "cross_window"),
        "mixer_options": {
            "slab": {"channel_kernel": 3},
            "cross_window": {"split_size": (1, 2, 7, None)},
        },
        "norm_layer": SWIN_NORM,
    },
)

PREPBN_DEIT = bodies.DEIT(paper=papers.PREPBN, config={"mixer": "softmax", "norm_layer": "prepbn"})
PREPBN_PVT = bodies.PVT(
    paper=papers.PREPBN,
    config={
        "mixer": ("spatial_reduction", "spatial_reduction", "spatial_reduction", "softmax"),
        "mixer_options": {"spatial_reduction": {"reduction": (8, 4, 2, 1), "norm_layer": "prepbn"}},
        "norm_layer": "prepbn",
    },
)
PREPBN_SWIN = bodies.SWIN(paper=papers.PREPBN, config={"mixer": "window"})


def _release(file: str) -> dict[str, Weights]:
    folder = "https://github.com/xinghaochen/SLAB/releases/download/ckpts"
    return {"in1k": Weights(url=f"{folder}/{file}.pth")}


register(
    __name__,
    {
        "slab_deit_tiny": Model(
            DEIT, bodies.DEIT_TINY, _release("slab_deit_tiny"), parameters=6_198_401, top1=74.3
        ),
        "slab_deit_small": Model(
            DEIT, bodies.DEIT_SMALL, _release("slab_deit_small"), parameters=22_992_641, top1=80.0
        ),
        "slab_pvt_tiny": Model(
            PVT, bodies.PVT_TINY, _release("slab_pvt_tiny"), parameters=12_157_692, top1=76.5
        ),
        "slab_pvt_small": Model(PVT, bodies.PVT_SMALL, parameters=21_683_788),
        "slab_pvt_medium": Model(PVT, bodies.PVT_MEDIUM, parameters=37_267_300),
        "slab_pvtv2_b0": Model(PVTV2, bodies.PVTV2_B0, parameters=3_599_968),
        "slab_pvtv2_b1": Model(PVTV2, bodies.PVTV2_B1, parameters=12_941_504),
        "slab_pvtv2_b2": Model(PVTV2, bodies.PVTV2_B2, parameters=22_564_880),
        "slab_swin_tiny": Model(
            SWIN, bodies.SWIN_TINY, _release("slab_swin_tiny"), parameters=29_216_605, top1=81.8
        ),
        "slab_swin_small": Model(
            SWIN, bodies.SWIN_SMALL, _release("slab_swin_small"), parameters=50_552_965, top1=83.6
        ),
        "slab_swin_base": Model(SWIN, bodies.SWIN_BASE, parameters=89_029_373),
        "slab_cswin_tiny": Model(
            CSWIN,
            bodies.CSWIN_TINY | {"depths": (2, 4, 18, 1)},
            _release("slab_cswin_tiny"),
            parameters=21_227_807,
            top1=82.8,
        ),
        "slab_cswin_small": Model(CSWIN, bodies.CSWIN_SMALL, parameters=35_494_205),
        "prepbn_deit_tiny": Model(
            PREPBN_DEIT,
            bodies.DEIT_TINY | {"norm_layer": "repbn"},
            _release("deit_tiny_prepbn"),
            parameters=5_717_441,
            top1=73.6,
        ),
        "prepbn_deit_small": Model(
            PREPBN_DEIT,
            bodies.DEIT_SMALL,
            _release("deit_small_prepbn"),
            parameters=22_069_889,
            top1=80.2,
        ),
        "prepbn_pvt_tiny": Model(
            PREPBN_PVT,
            bodies.PVT_TINY,
            _release("pvt_tiny_prepbn"),
            parameters=13_239_554,
            top1=76.0,
        ),
        "prepbn_pvt_small": Model(
            PREPBN_PVT,
            bodies.PVT_SMALL,
            _release("pvt_small_prepbn"),
            parameters=24_507_801,
            top1=80.1,
        ),
        "prepbn_pvt_medium": Model(
            PREPBN_PVT,
            bodies.PVT_MEDIUM,
            _release("pvt_medium_prepbn"),
            parameters=44_253_117,
            top1=81.7,
        ),
        "prepbn_swin_tiny": Model(
            PREPBN_SWIN,
            bodies.SWIN_TINY | {"norm_layer": "repbn"},
            _release("swin_tiny_prepbn"),
            parameters=28_288_383,
            top1=81.4,
        ),
    },
)
