"""VAN: large kernel attention, which is convolutions and a product."""

from ..registry import Family, Model, Weights, register
from ..skeletons import van
from . import papers

VAN = Family(
    skeleton=van.VAN,
    filter_fn=van.checkpoint_filter_fn,
    paper=papers.VAN,
    first_conv="stem.embed.conv",
    classifier="head.fc",
    config={"mixer": "large_kernel"},
    data={"crop_pct": 0.9},
)
WIDTHS = (64, 128, 320, 512)


def _in1k(size: str, top1: int) -> dict[str, Weights]:
    file = f"van_{size.lower()}_{top1}.pth.tar"
    return {"in1k": Weights(f"Visual-Attention-Network/VAN-{size}-original", file)}


register(
    __name__,
    {
        "van_b0": Model(
            VAN,
            {"embed_dim": (32, 64, 160, 256), "depths": (3, 3, 5, 2)},
            _in1k("Tiny", 754),
            parameters=4_105_800,
            top1=75.4,
        ),
        "van_b1": Model(
            VAN,
            {"embed_dim": WIDTHS, "depths": (2, 2, 4, 2)},
            _in1k("Small", 811),
            parameters=13_861_800,
            top1=81.1,
        ),
        "van_b2": Model(
            VAN,
            {"embed_dim": WIDTHS, "depths": (3, 3, 12, 3)},
            _in1k("Base", 828),
            parameters=26_578_472,
            top1=82.8,
        ),
        "van_b3": Model(
            VAN,
            {"embed_dim": WIDTHS, "depths": (3, 5, 27, 3)},
            _in1k("Large", 839),
            parameters=44_765_608,
            top1=83.9,
        ),
        "van_b4": Model(VAN, {"embed_dim": WIDTHS, "depths": (3, 6, 40, 3)}, parameters=60_283_176),
        "van_b5": Model(
            VAN,
            {"embed_dim": (96, 192, 480, 768), "depths": (3, 3, 24, 3)},
            parameters=89_967_688,
        ),
        "van_b6": Model(
            VAN,
            {"embed_dim": (96, 192, 384, 768), "depths": (6, 6, 90, 6)},
            parameters=199_829_416,
        ),
    },
)
