"""The bodies that papers share: a skeleton with its sizes, to which a paper adds its mixer."""

from functools import partial
from typing import Any

from ..registry import Family, Weights
from ..skeletons import cswin, pvt, pvtv2, ravlt, soft, swin, twins, vit

DEIT = partial(
    Family,
    skeleton=vit.VisionTransformer,
    filter_fn=vit.checkpoint_filter_fn,
    first_conv="patch_embed.proj",
    classifier="head",
    # The last three blocks' maps, as in timm.
    out_indices=3,
)
DISTILLED_DEIT = partial(
    DEIT, skeleton=vit.DistilledVisionTransformer, classifier=("head", "head_dist")
)
DEIT_TINY = {"embed_dim": 192, "num_heads": 3}
DEIT_SMALL = {"embed_dim": 384, "num_heads": 6}
DEIT_BASE = {"embed_dim": 768, "num_heads": 12}

DINOV2 = partial(DEIT, data={"input_size": (3, 518, 518), "pool_size": (37, 37), "crop_pct": 1.0})
DINOV2_SMALL = DEIT_SMALL | {"patch_size": 14, "layer_scale": 1e-5, "img_size": 518}
DINOV2_BASE = DINOV2_SMALL | {"embed_dim": 768, "num_heads": 12}
DINOV2_LARGE = DINOV2_SMALL | {"embed_dim": 1024, "num_heads": 16, "depth": 24}

DINOV3 = partial(DEIT, data={"input_size": (3, 256, 256), "pool_size": (16, 16), "crop_pct": 1.0})
DINOV3_SMALL = DEIT_SMALL | {
    "reg_tokens": 4,
    "rotary_temperature": 100.0,
    "layer_scale": 1e-5,
    "norm_eps": 1e-5,
    "img_size": 256,
}
DINOV3_SMALL_PLUS = DINOV3_SMALL | {"mlp_layer": "swiglu"}
DINOV3_BASE = DINOV3_SMALL | {"embed_dim": 768, "num_heads": 12}
DINOV3_LARGE = DINOV3_SMALL | {"embed_dim": 1024, "num_heads": 16, "depth": 24}

PVT = partial(
    Family,
    skeleton=pvt.PyramidVisionTransformer,
    filter_fn=pvt.checkpoint_filter_fn,
    first_conv="stem.proj",
    classifier="head.fc",
)
PVT_TINY = {"depths": (2, 2, 2, 2)}
PVT_SMALL = {"depths": (3, 4, 6, 3)}
PVT_MEDIUM = {"depths": (3, 4, 18, 3)}
PVT_LARGE = {"depths": (3, 8, 27, 3)}

PVTV2 = partial(
    Family,
    skeleton=pvtv2.PyramidVisionTransformerV2,
    filter_fn=pvtv2.checkpoint_filter_fn,
    first_conv="stem.proj",
    classifier="head.fc",
)
PVTV2_B0 = {"embed_dim": (32, 64, 160, 256), "depths": (2, 2, 2, 2)}
PVTV2_B1 = {"depths": (2, 2, 2, 2)}
PVTV2_B2 = {"depths": (3, 4, 6, 3)}
PVTV2_B3 = {"depths": (3, 4, 18, 3)}
PVTV2_B4 = {"depths": (3, 8, 27, 3)}
PVTV2_B5 = {"depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4)}

SWIN = partial(
    Family,
    skeleton=swin.SwinTransformer,
    filter_fn=swin.checkpoint_filter_fn,
    first_conv="stem.proj",
    classifier="head.fc",
)
SWIN_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
SWIN_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
SWIN_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
SWIN_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}

CSWIN = partial(
    Family,
    skeleton=cswin.CSwinTransformer,
    filter_fn=cswin.checkpoint_filter_fn,
    first_conv="stem.proj",
    classifier="head.fc",
)
CSWIN_TINY = {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16)}
CSWIN_SMALL = {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)}
CSWIN_BASE = {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32)}
CSWIN_LARGE = {"embed_dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24)}

# RAVLT and MAViT have the same shapes, and differ in the mixer and the head.
RAVLT = partial(
    Family,
    skeleton=ravlt.RAVLT,
    filter_fn=ravlt.checkpoint_filter_fn,
    first_conv="stem.0.conv",
    classifier="head.fc",
)
RAVLT_NANO = {
    "embed_dim": (32, 64, 128, 192),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 6),
    "head_hidden_size": 512,
}
RAVLT_TINY = {"embed_dim": 64, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
RAVLT_SMALL = {
    "embed_dim": (64, 128, 320, 512),
    "depths": (3, 5, 9, 3),
    "num_heads": (1, 2, 5, 8),
}
RAVLT_BASE = {
    "embed_dim": (96, 192, 384, 512),
    "depths": (4, 6, 12, 6),
    "num_heads": (1, 2, 6, 8),
    "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
}
RAVLT_LARGE = {
    "embed_dim": (96, 192, 448, 640),
    "depths": (4, 7, 19, 8),
    "num_heads": (1, 2, 7, 10),
    "layer_scale": 1e-6,
}

SOFT = partial(
    Family,
    skeleton=soft.SOFT,
    filter_fn=soft.checkpoint_filter_fn,
    first_conv="stem.0.conv",
    classifier="head.fc",
    data={"crop_pct": 0.9},
)

TWINS = partial(
    Family,
    skeleton=twins.Twins,
    filter_fn=twins.checkpoint_filter_fn,
    first_conv="stem.proj",
    classifier="head.fc",
)
TWINS_SMALL = {"embed_dim": 64, "depths": (2, 2, 10, 4), "num_heads": (2, 4, 8, 16)}
TWINS_BASE = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
TWINS_LARGE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


def weights_at(
    size: int,
    url: str | None = None,
    page: str | None = None,
    arguments: dict[str, Any] | None = None,
    pool_size: tuple[int, int] | None = None,
    **config: Any,
) -> Weights:
    """Weights of images of size x size pixels, which are resized without a crop by default.

    Args:
        size: side of the images in pixels.
        url, page: see `Weights`.
        arguments: constructor arguments beyond the images' size.
        pool_size: the last map's (H, W), by default that of stride 32.
        **config: further differences from the family's data configuration.
    """
    shape = {"input_size": (3, size, size), "pool_size": pool_size or (size // 32, size // 32)}
    return Weights(
        url=url,
        page=page,
        config={"crop_pct": 1.0} | config | shape,
        arguments={"img_size": size} | (arguments or {}),
    )
