"""Attention maps: timm's extractor reads them from models built without fused attention."""

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from timm.utils import AttentionExtract

import linsight.backbones  # noqa: F401 -- registers the models


@pytest.fixture
def plain_attention():
    fused = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(bool(fused))


@pytest.mark.parametrize(
    "name",
    [
        "softmax_deit_tiny",
        "softmax_swin_tiny",
        pytest.param("softmax_cswin_tiny", marks=pytest.mark.slow),
        "rala_vit_nano",
        "softmax_pvt_tiny",
        pytest.param("l2vit_tiny", marks=pytest.mark.slow),
        "favit_b0",
    ],
)
def test_extractor_finds_attention_maps(name: str, plain_attention: None) -> None:
    options = {"img_size": 64} if "deit" in name else {}
    torch.manual_seed(0)
    plain = timm.create_model(name, **options).eval()
    set_fused_attn(True)
    fused = timm.create_model(name, **options).eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = AttentionExtract(plain, method="hook")(x)
        torch.testing.assert_close(plain(x), fused(x), atol=1e-4, rtol=1e-4)
    assert maps
    for attention in maps.values():
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert not any(name.endswith("attn_drop") for name, _ in fused.named_modules())
