"""Kernels compile for other GPUs than an H100, and fit their shared memory. No GPU is needed."""

import pytest
import timm
import torch
from torch import Tensor, nn

import linsight.backbones  # noqa: F401 -- registers the models
from linsight.backbones.initialization import shapes_only
from linsight.backbones.norms import LayerNorm
from linsight.kernels.hash_attention import MOST_ANCHORS, MOST_BITS, hash_attention
from linsight.kernels.runtime import dispatch
from linsight.kernels.runtime.compilation import Variant, collect_variants, find_kernel
from linsight.kernels.runtime.dispatch import HAS_TRITON
from linsight.kernels.runtime.private import compile_description, make_target, pretend_target
from linsight.kernels.runtime.rehearsal import Pass, rehearse

from .conftest import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile"),
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
]

# KiB of shared memory that a program may have: Ampere, Ada, Blackwell of data centres and of desks.
SHARED = {"sm_80": 163, "sm_89": 99, "sm_100": 227, "sm_120": 99}
MODELS = (
    *("rala_vit_small", "mala_vit_base", "nala_vit_small", "soft_vit_small", "agent_swin_tiny"),
    *("softmax_cswin_tiny", "inline_pvt_tiny", "flatten_swin_tiny", "pola_pvt_tiny"),
    *("flowformer_19", "mhla_deit_tiny", "ecoformer_pvtv2_b0", "slab_swin_tiny", "van_b0"),
    *("care_s0", "favit_b1"),
)


def assert_fits(
    arch: str,
    network: nn.Module,
    shape: tuple,
    autocast: torch.dtype | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compile a training step for an architecture, and look at what it needs."""
    step = Pass(shape, dtype, True, True, autocast, torch.device("cuda", 0))
    variants: list[Variant] = []
    with pretend_target(make_target(arch)):
        with collect_variants(variants.append):
            rehearse(network, step)
        assert variants
        for variant in variants:
            compiled = compile_description(find_kernel(variant), variant.description)
            assert compiled.metadata.shared <= SHARED[arch] * 1024, variant
            # Columns of tensor memory, which GPUs of compute capability 10 have.
            assert (getattr(compiled.metadata, "tmem_size", 0) or 0) <= 512, variant


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("arch", SHARED)
def test_a_norm_of_float32_fits(arch):
    assert_fits(arch, LayerNorm(96), (8, 14, 14, 96), None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("arch", SHARED)
def test_a_training_step_fits(arch, model, dtype):
    with shapes_only():
        network = timm.create_model(model)
    assert_fits(arch, network, (8, *network.pretrained_cfg["input_size"]), dtype)


class Hash(nn.Module):
    """Attention between codes with as many anchors and bits as its kernels take."""

    anchors: Tensor
    means: Tensor
    hyperplanes: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(()))
        for name, shape in (
            ("anchors", (2, MOST_ANCHORS, width)),
            ("means", (2, MOST_ANCHORS)),
            ("hyperplanes", (2, MOST_BITS, MOST_ANCHORS)),
        ):
            self.register_buffer(name, torch.empty(shape))

    def forward(self, x):
        x = x * self.scale.to(x.dtype)
        return hash_attention(x, x, self.anchors, self.means, self.hyperplanes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", SHARED)
def test_the_widest_hash_attention_fits(arch, dtype):
    width = 64 if SHARED[arch] < 163 else 128
    assert_fits(arch, Hash(width), (2, 196, 2, width), None, dtype)


def test_wide_heads_of_hash_attention_need_room():
    found: list[Variant] = []
    step = Pass((2, 196, 2, 65), torch.float32, True, True, None, torch.device("cuda", 0))
    with pretend_target(make_target("sm_89")), collect_variants(found.append):
        rehearse(Hash(65), step)
    assert not found


@pytest.mark.parametrize(
    ("arch", "doubled", "width"),
    [
        *(("sm_80", False, 128), ("sm_89", False, 64), ("sm_90", False, 128)),
        *(("sm_120", False, 64), ("sm_80", True, 64), ("sm_90", True, 128)),
    ],
)
def test_wide_heads_of_linear_attention_need_room(arch, doubled, width):
    with pretend_target(make_target(arch)), collect_variants(print):
        device = torch.device("cuda", 0)
        assert dispatch.state_fits(width, device, doubled)
        assert not dispatch.state_fits(width + 1, device, doubled)
