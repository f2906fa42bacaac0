"""EcoFormer: attention through hash codes in the bodies of PVTv2 and Twins."""

from ..registry import Model, Weights, register
from . import bodies, papers

PVTV2 = bodies.PVTV2(
    paper=papers.ECOFORMER,
    config={"mixer": ("ecoformer", "ecoformer", "ecoformer", "softmax")},
)
TWINS = bodies.TWINS(
    paper=papers.ECOFORMER,
    config={"mixer": ("ecoformer", "ecoformer", "ecoformer", "softmax")},
)


def _release(file: str) -> dict[str, Weights]:
    releases = "https://github.com/ziplab/EcoFormer/releases/download/v1.0"
    return {"in1k": Weights(url=f"{releases}/{file}_ecoformer.pth")}


register(
    __name__,
    {
        "ecoformer_pvtv2_b0": Model(
            PVTV2, bodies.PVTV2_B0, _release("pvtv2_b0"), parameters=3_136_328, top1=70.44
        ),
        "ecoformer_pvtv2_b1": Model(PVTV2, bodies.PVTV2_B1, _release("pvtv2_b1"), top1=78.38),
        "ecoformer_pvtv2_b2": Model(PVTV2, bodies.PVTV2_B2, _release("pvtv2_b2"), top1=81.28),
        "ecoformer_pvtv2_b3": Model(PVTV2, bodies.PVTV2_B3, _release("pvtv2_b3"), top1=81.96),
        "ecoformer_pvtv2_b4": Model(PVTV2, bodies.PVTV2_B4, _release("pvtv2_b4"), top1=81.90),
        "ecoformer_twins_small": Model(
            TWINS, bodies.TWINS_SMALL, _release("twins_svt_s"), top1=80.22
        ),
    },
)
