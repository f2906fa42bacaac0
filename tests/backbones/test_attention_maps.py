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


def tokens(name: str, **options) -> tuple[torch.nn.Module, torch.Tensor]:
    """A softmax mixer of a ViT with a class token, and the mixer's output for a fixed input."""
    torch.manual_seed(0)
    small = {"img_size": 64, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 4}
    model = timm.create_model(name, mixer_options={"softmax": options}, **small).double().eval()
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    found = []
    mixer = model.get_submodule("blocks.0.mixer")
    mixer.register_forward_hook(lambda part, args, y: found.extend((args[0], y)))
    model(torch.randn(2, 3, 64, 64).double())
    x, y = found
    q, k, v = mixer.in_proj(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 4).softmax(-1)
    if alpha := options.get("clip_alpha"):
        low, high = -alpha / x.shape[1], options.get("clip_zeta", 1)
        weights = torch.clamp((high - low) * weights + low, 0, 1)
        assert (weights == 0).any()  # to which nothing is attended
        assert (weights > 0).any()
    heads = weights @ v
    if options.get("head_gate"):
        heads = heads * mixer.head_gate(x).sigmoid().mT[..., None]
    wanted = mixer.out_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, wanted)
    return model, y


def test_clipped_softmax_and_gated_heads() -> None:
    """The papers' equations, alone and together, and gradients of all weights."""
    outputs = [
        tokens("softmax_deit_tiny", **options)[1]
        for options in ({}, {"clip_alpha": 4.0}, {"clip_alpha": 2.0, "clip_zeta": 1.1})
    ]
    assert not torch.equal(outputs[0], outputs[1])
    model, y = tokens("softmax_deit_tiny", clip_alpha=4.0, head_gate=True)
    y.square().sum().backward()
    mixer = model.get_submodule("blocks.0.mixer")
    grads = {name: weight.grad for name, weight in mixer.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []
    with pytest.raises(ValueError, match=r"clip_alpha is -1.*such as 4.0 and 1.0"):
        timm.create_model("softmax_deit_tiny", mixer_options={"softmax": {"clip_alpha": -1}})
