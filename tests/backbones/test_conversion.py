"""timm's plain vision transformers and Swin, turned into models of this library."""

import pytest
import timm
import torch

from linsight.backbones.conversion import convert_timm_model, describe_timm_model
from linsight.backbones.initialization import shapes_only

from .conftest import lively

NANO = {"embed_dim": 32, "depth": 2, "num_heads": 2}
NANO_SWIN = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
# Name, further arguments, and the name of the twin.
MODELS = {
    "vit_tiny_patch16_224": ({}, "softmax_deit_tiny"),
    "vit_base_patch16_224_miil": ({"num_classes": 7}, "softmax_deit_tiny"),  # no bias of q, k, v
    "deit_tiny_distilled_patch16_224": ({}, "softmax_deit_tiny_distilled"),
    "deit3_small_patch16_224": ({}, "softmax_deit_tiny"),
    "vit_small_patch14_dinov2": ({"img_size": 56}, "softmax_dinov2_small"),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 56}, "softmax_dinov2_small"),
    "vit_giant_patch14_reg4_dinov2": ({"img_size": 56}, "softmax_dinov2_small"),
    "vit_small_patch16_dinov3": ({"img_size": (48, 80)}, "softmax_dinov3_small"),
    "vit_small_plus_patch16_dinov3_qkvb": (
        {"qkv_fused": False, "num_classes": 7},
        "softmax_dinov3_small_plus",
    ),
    "vit_giant_patch16_lingbot": (
        {"img_size": 64, "init_values": None},
        "softmax_dinov3_small_plus",
    ),
    "vit_medium_patch16_reg4_gap_256": ({"img_size": 64}, "softmax_deit_tiny"),
    "vit_base_patch16_clip_quickgelu_224": ({"img_size": 64}, "softmax_deit_tiny"),
    # Windows of 7 on maps of 18 x 15 and 9 x 8, which a window does not divide.
    "swin_tiny_patch4_window7_224": ({"img_size": (72, 60)}, "softmax_swin_tiny"),
    "swin_base_patch4_window12_384": ({"window_size": 2, "img_size": 32}, "softmax_swin_tiny"),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_timms(name):
    options, twin = MODELS[name]
    size = NANO_SWIN if name.startswith("swin") else NANO
    theirs = lively(timm.create_model(name, **size | options))
    ours = convert_timm_model(theirs)
    assert ours.pretrained_cfg["architecture"] == twin
    assert ours.pretrained_cfg["mean"] == theirs.pretrained_cfg["mean"]
    x = torch.randn(2, 3, *theirs.patch_embed.img_size)
    with torch.inference_mode():
        for compute in ("forward_features", "forward"):
            wanted, got = getattr(theirs, compute)(x), getattr(ours, compute)(x)
            assert (got - wanted).norm() / wanted.norm() < 1e-5
    # The name and its arguments build the same model again.
    again = timm.create_model(twin, **ours.model_args).eval()
    again.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(again(x), ours(x))


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_another_size_is_timms(name):
    """Positions of patches are interpolated apart from the registers, which have none; rotary ones
    reach from one border of the map to the other at any size."""
    options = {"img_size": 56 if "14" in name else 64, "dynamic_img_size": True}
    theirs = lively(timm.create_model(name, dynamic_img_pad=True, **NANO | options))
    x = torch.randn(1, 3, 84, 70)
    with torch.inference_mode():
        wanted, got = theirs(x), convert_timm_model(theirs)(x)
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def test_a_published_size_has_a_name_of_its_own():
    with shapes_only():
        theirs = timm.create_model("vit_large_patch14_reg4_dinov2", num_classes=0)
    name, arguments = describe_timm_model(theirs)
    assert name == "softmax_dinov2_large"
    registers = {"reg_tokens": 4, "no_embed_class": True}
    assert arguments == {"num_classes": 0, "global_pool": "token"} | registers
    for size in ("small", "small_plus", "base", "large"):
        with shapes_only():
            theirs = timm.create_model(f"vit_{size}_patch16_dinov3")
        wanted = f"softmax_dinov3_{size}", {"num_classes": 0, "global_pool": "avg"}
        assert describe_timm_model(theirs) == wanted


def test_the_authors_registers(tmp_path):
    """DINOv2's own file: a class token with a position, registers without one, a mask token."""
    model = timm.create_model("softmax_dinov2_small.lvd142m_reg4", img_size=56, **NANO)
    state = lively(model).state_dict()
    position = torch.randn(1, 1, 32)
    theirs = {
        name.replace("mixer.in_proj", "attn.qkv")
        .replace("mixer.out_proj", "attn.proj")
        .replace("gamma1", "ls1.gamma")
        .replace("gamma2", "ls2.gamma"): value.flatten() if "gamma" in name else value
        for name, value in state.items()
    }
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["cls_token"] = theirs["cls_token"] - position
    theirs["pos_embed"] = torch.cat((position, theirs["pos_embed"]), 1)
    theirs["mask_token"] = torch.zeros(1, 32)
    torch.save(theirs, tmp_path / "dinov2.pth")
    loaded = timm.create_model(
        "softmax_dinov2_small.lvd142m_reg4",
        img_size=56,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "dinov2.pth")},
        **NANO,
    )
    x = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(x), model(x))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_base_patch16_siglip_224", "attention pooling"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("eva02_tiny_patch14_224", "other positions than DINOv3's"),
        ("vit_small_patch16_rope_224", "other positions than DINOv3's"),
        ("vit_base_patch16_sapiens2", "another attention than timm's EvaAttention"),
        ("swinv2_tiny_window8_256", "is a SwinTransformerV2"),
        ("swin_s3_tiny_224", None),
        ("rala_vit_nano", "model is a RAVLT"),
        ("vit_small_patch16_36x1_224.untrained", None),
        ("vit_small_patch16_18x2_224", "blocks other"),
    ],
)
def test_what_is_not_supported_is_named(name, part):
    with shapes_only():
        model = timm.create_model(name.split(".")[0])
    if part is None:
        arguments = describe_timm_model(model)[1]
        assert arguments.get("depth") == 36 or "window_size" in arguments["mixer_options"]["window"]
        return
    with pytest.raises(ValueError, match=f"{part}.*supported are timm's plain"):
        convert_timm_model(model)
