"""The baselines with softmax attention: DeiT, DINOv2, DINOv3, PVT, PVTv2, Swin, CSwin and
Twins."""

from typing import Any

from ..registry import Model, Weights, register
from . import bodies, papers

DEIT = bodies.DEIT(paper=papers.DEIT, config={"mixer": "softmax"})
DISTILLED_DEIT = bodies.DISTILLED_DEIT(paper=papers.DEIT, config={"mixer": "softmax"})
DINOV2 = bodies.DINOV2(paper=papers.DINOV2, config={"mixer": "softmax"})
DINOV3 = bodies.DINOV3(paper=papers.DINOV3, config={"mixer": "softmax"})
REDUCTION = {
    "mixer": ("spatial_reduction", "spatial_reduction", "spatial_reduction", "softmax"),
    "mixer_options": {"spatial_reduction": {"reduction": (8, 4, 2, 1)}},
}
PVT = bodies.PVT(paper=papers.PVT, config=REDUCTION | {"class_token": True})
PVTV2 = bodies.PVTV2(paper=papers.PVTV2, config=REDUCTION, data={"crop_pct": 0.9})
SWIN = bodies.SWIN(
    paper=papers.SWIN,
    # timm's order of shift and padding, which matters for a map that is no multiple of 7.
    config={"mixer": "window", "mixer_options": {"window": {"padding": "end_after_shift"}}},
)
CSWIN = bodies.CSWIN(
    paper=papers.CSWIN,
    config={
        "mixer": "cross_window",
        "mixer_options": {"cross_window": {"split_size": (1, 2, 7, None)}},
    },
)
TWINS = bodies.TWINS(
    paper=papers.TWINS,
    config={"mixer_options": {"spatial_reduction": {"reduction": (8, 4, 2, 1)}}},
    data={"crop_pct": 0.9},
)


def _twins(size: str, parameters: int, top1: float) -> Model:
    sizes = getattr(bodies, f"TWINS_{size.upper()}")
    wide = ("spatial_reduction",) * 3 + ("softmax",)
    return Model(
        TWINS,
        sizes
        | {
            "mixer": tuple(
                ("local_window", name) * (depth // 2)
                for name, depth in zip(wide, sizes["depths"], strict=True)
            )
        },
        {"in1k": Weights(f"timm/twins_svt_{size}.in1k", "pytorch_model.bin")},
        parameters=parameters,
        top1=top1,
    )


def _deit(size: str, digest: str, larger: str | None = None) -> dict[str, Weights]:
    """The tags of a size, such as 'base_distilled'; `larger` is the 384 px file's digest."""
    release = f"https://dl.fbaipublicfiles.com/deit/deit_{size}_patch16"
    weights = {"fb_in1k": Weights(url=f"{release}_224-{digest}.pth")}
    if larger is not None:
        url = f"{release}_384-{larger}.pth"
        weights["fb_in1k_384"] = bodies.weights_at(384, url=url, pool_size=(24, 24))
    return weights


def _dinov2(size: str) -> dict[str, Weights]:
    """The weights without and with four register tokens."""
    hub = f"timm/vit_{size}_patch14"
    file, config = "pytorch_model.bin", {"num_classes": 0, "input_size": (3, 518, 518)}
    registers = {"reg_tokens": 4, "no_embed_class": True}
    return {
        "lvd142m": Weights(f"{hub}_dinov2.lvd142m", file, config=config),
        "lvd142m_reg4": Weights(
            f"{hub}_reg4_dinov2.lvd142m", file, config=config, arguments=registers
        ),
    }


def _dinov3(size: str, **satellite: Any) -> dict[str, Weights]:
    """The weights from photographs; `satellite` is how images of those from satellites differ."""
    hub, file = f"timm/vit_{size}_patch16_dinov3", "pytorch_model.bin"
    config = {"num_classes": 0, "input_size": (3, 256, 256)}
    weights = {"lvd1689m": Weights(f"{hub}.lvd1689m", file, config=config)}
    if satellite:
        weights["sat493m"] = Weights(f"{hub}.sat493m", file, config=config | satellite)
    return weights


def _pvt(size: str) -> dict[str, Weights]:
    releases = "https://github.com/whai362/PVT/releases/download/v2"
    return {"in1k": Weights(url=f"{releases}/pvt_{size}.pth")}


def _pvtv2(size: str, parameters: int, top1: float, mask_rcnn: tuple[float, float]) -> Model:
    sizes = getattr(bodies, f"PVTV2_{size.upper()}")
    return Model(
        PVTV2,
        sizes,
        _pvt(f"v2_{size}"),
        parameters=parameters,
        top1=top1,
        mask_rcnn=mask_rcnn,
    )


def _swin(size: str) -> dict[str, Weights]:
    release = "https://github.com/SwinTransformer/storage/releases/download"
    old, new = f"{release}/v1.0.0", f"{release}/v1.0.8"
    file = f"swin_{size}_patch4_window7_224"
    larger = f"{old}/swin_{size}_patch4_window12_384"
    in22k = {"num_classes": 21841}
    windows = {"mixer_options": {"window": {"window_size": 12}}}
    if size in ("tiny", "small"):
        return {
            "ms_in1k": Weights(url=f"{old}/{file}.pth"),
            "ms_in22k_ft_in1k": Weights(url=f"{new}/{file}_22kto1k_finetune.pth"),
            "ms_in22k": Weights(url=f"{new}/{file}_22k.pth", config=in22k),
        }
    weights = {
        "ms_in22k_ft_in1k": Weights(url=f"{old}/{file}_22kto1k.pth"),
        "ms_in22k_ft_in1k_384": bodies.weights_at(
            384, url=f"{larger}_22kto1k.pth", arguments=windows
        ),
        "ms_in22k": Weights(url=f"{old}/{file}_22k.pth", config=in22k),
        "ms_in22k_384": bodies.weights_at(
            384, url=f"{larger}_22k.pth", arguments=windows, num_classes=21841
        ),
    }
    if size == "large":
        return weights
    return {
        "ms_in1k": Weights(url=f"{old}/{file}.pth"),
        "ms_in1k_384": bodies.weights_at(384, url=f"{larger}.pth", arguments=windows),
    } | weights


def _cswin(size: str) -> dict[str, Weights]:
    release = "https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0"
    tag = "ms_in22k_ft_in1k" if size == "large" else "ms_in1k"
    weights = {tag: Weights(url=f"{release}/cswin_{size}_224.pth", config={"crop_pct": 0.9})}
    if size in ("base", "large"):
        stripes = {"mixer_options": {"cross_window": {"split_size": (1, 2, 12, None)}}}
        url = f"{release}/cswin_{size}_384.pth"
        weights[f"{tag}_384"] = bodies.weights_at(384, url=url, arguments=stripes)
    if size == "large":
        url = f"{release}/cswin_large_22k_224.pth"
        weights["ms_in22k"] = Weights(url=url, config={"crop_pct": 0.9, "num_classes": 21841})
    return weights


register(
    __name__,
    {
        "softmax_deit_tiny": Model(
            DEIT, bodies.DEIT_TINY, _deit("tiny", "a1311bcf"), parameters=5_717_416, top1=72.2
        ),
        "softmax_deit_small": Model(
            DEIT, bodies.DEIT_SMALL, _deit("small", "cd65a155"), parameters=22_050_664, top1=79.9
        ),
        "softmax_deit_base": Model(
            DEIT,
            bodies.DEIT_BASE,
            _deit("base", "b5f2ef4d", "8de9b5d1"),
            parameters=86_567_656,
            top1=81.8,
        ),
        "softmax_deit_tiny_distilled": Model(
            DISTILLED_DEIT,
            bodies.DEIT_TINY,
            _deit("tiny_distilled", "b40b3cf7"),
            parameters=5_910_800,
            top1=74.5,
        ),
        "softmax_deit_small_distilled": Model(
            DISTILLED_DEIT,
            bodies.DEIT_SMALL,
            _deit("small_distilled", "649709d9"),
            parameters=22_436_432,
            top1=81.2,
        ),
        "softmax_deit_base_distilled": Model(
            DISTILLED_DEIT,
            bodies.DEIT_BASE,
            _deit("base_distilled", "df68dfff", "d0272ac0"),
            parameters=87_338_192,
            top1=83.4,
        ),
        "softmax_dinov2_small": Model(DINOV2, bodies.DINOV2_SMALL, _dinov2("small")),
        "softmax_dinov2_base": Model(DINOV2, bodies.DINOV2_BASE, _dinov2("base")),
        "softmax_dinov2_large": Model(DINOV2, bodies.DINOV2_LARGE, _dinov2("large")),
        "softmax_dinov3_small": Model(DINOV3, bodies.DINOV3_SMALL, _dinov3("small")),
        "softmax_dinov3_small_plus": Model(DINOV3, bodies.DINOV3_SMALL_PLUS, _dinov3("small_plus")),
        "softmax_dinov3_base": Model(DINOV3, bodies.DINOV3_BASE, _dinov3("base")),
        "softmax_dinov3_large": Model(
            DINOV3,
            bodies.DINOV3_LARGE,
            _dinov3("large", mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143)),
        ),
        "softmax_pvt_tiny": Model(
            PVT,
            bodies.PVT_TINY,
            _pvt("tiny"),
            parameters=13_229_288,
            top1=75.1,
            mask_rcnn=(36.7, 35.1),
        ),
        "softmax_pvt_small": Model(
            PVT,
            bodies.PVT_SMALL,
            _pvt("small"),
            parameters=24_485_864,
            top1=79.8,
            mask_rcnn=(40.4, 37.8),
        ),
        "softmax_pvt_medium": Model(
            PVT,
            bodies.PVT_MEDIUM,
            _pvt("medium"),
            parameters=44_208_104,
            top1=81.2,
            mask_rcnn=(42.0, 39.0),
        ),
        "softmax_pvt_large": Model(
            PVT,
            bodies.PVT_LARGE,
            _pvt("large"),
            parameters=61_369_320,
            top1=81.7,
            mask_rcnn=(42.9, 39.5),
        ),
        "softmax_pvtv2_b0": _pvtv2("b0", 3_666_760, 70.5, (38.2, 36.2)),
        "softmax_pvtv2_b1": _pvtv2("b1", 14_009_000, 78.7, (41.8, 38.8)),
        "softmax_pvtv2_b2": _pvtv2("b2", 25_362_856, 82.0, (45.3, 41.2)),
        "softmax_pvtv2_b3": _pvtv2("b3", 45_238_696, 83.1, (47.0, 42.5)),
        "softmax_pvtv2_b4": _pvtv2("b4", 62_556_072, 83.6, (47.5, 42.7)),
        "softmax_pvtv2_b5": _pvtv2("b5", 81_956_008, 83.8, (47.4, 42.5)),
        "softmax_swin_tiny": Model(
            SWIN,
            bodies.SWIN_TINY,
            _swin("tiny"),
            parameters=28_288_354,
            top1=81.2,
            mask_rcnn=(43.7, 39.8),
            upernet=44.51,
        ),
        "softmax_swin_small": Model(
            SWIN, bodies.SWIN_SMALL, _swin("small"), parameters=49_606_258, top1=83.2, upernet=47.64
        ),
        "softmax_swin_base": Model(
            SWIN, bodies.SWIN_BASE, _swin("base"), parameters=87_768_224, top1=83.5, upernet=48.13
        ),
        "softmax_swin_large": Model(
            SWIN, bodies.SWIN_LARGE, _swin("large"), parameters=196_532_476, top1=86.3
        ),
        "softmax_cswin_tiny": Model(
            CSWIN, bodies.CSWIN_TINY, _cswin("tiny"), parameters=22_320_552, top1=82.8, upernet=49.3
        ),
        "softmax_cswin_small": Model(
            CSWIN,
            bodies.CSWIN_SMALL,
            _cswin("small"),
            parameters=34_643_304,
            top1=83.6,
            upernet=50.4,
        ),
        "softmax_cswin_base": Model(
            CSWIN, bodies.CSWIN_BASE, _cswin("base"), parameters=77_382_184, top1=84.2, upernet=51.1
        ),
        "softmax_cswin_large": Model(
            CSWIN, bodies.CSWIN_LARGE, _cswin("large"), parameters=173_262_664, top1=86.5
        ),
        "softmax_twins_small": _twins("small", 24_060_776, 81.7),
        "softmax_twins_base": _twins("base", 56_070_952, 83.2),
        "softmax_twins_large": _twins("large", 99_271_400, 83.7),
    },
)
