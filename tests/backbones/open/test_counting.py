"""Operations as PyTorch and fvcore count them."""

from collections import Counter

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from linsight.backbones.initialization import shapes_only
from linsight.kernels import force
from linsight.tools.models import read_counts

from .models import FAMILIES, PARTS, SKELETONS, quick

# Softmax, linear attention and large kernels, on tokens and on maps.
FEW = ["ecoformer_pvtv2_b0", "mala_vit_nano", "softmax_deit_tiny_distilled", "van_b0"]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        pytest.param(name, kernels, marks=[] if name in chosen else pytest.mark.slow)
        for kernels, names, chosen in (("triton", FAMILIES, PARTS), ("reference", SKELETONS, FEW))
        for name in names
    ],
)
def test_operations_counted_by_pytorch(name, kernels):
    """What docs/zoo.md says, from a user's call; a model in training counts the same."""
    with torch.device("meta"), force(kernels):
        with shapes_only():
            model = timm.create_model(name).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    _, multiply_adds = read_counts()[name]
    assert counter.get_total_flops() == pytest.approx(2 * multiply_adds, rel=0.01)


def count_attention(inputs: list, outputs: list) -> Counter:
    """Multiply-adds of `scaled_dot_product_attention`, which fvcore does not know."""
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    *batch, tokens, dim = query
    pairs = torch.Size(batch).numel() * tokens * key[-2]
    return Counter(attention=pairs * (dim + value[-1]))


# How fvcore names the operators that it counts.
PRODUCTS = ("addmm", "attention", "bmm", "conv", "einsum", "linear", "matmul")
NO_PRODUCTS = ("adaptive_avg_pool2d", "batch_norm", "layer_norm", "upsample_bilinear2d")


@pytest.mark.parametrize("name", quick(PARTS, FEW))
def test_operations_counted_by_fvcore(name):
    from fvcore.nn import FlopCountAnalysis

    # PyTorch cannot trace a convolution on the meta device, so this computes.
    model = timm.create_model(name).eval().requires_grad_(False)
    counter = FlopCountAnalysis(model, torch.randn(1, 3, 224, 224))
    counter.set_op_handle("aten::scaled_dot_product_attention", count_attention)
    counter.unsupported_ops_warnings(False)
    # docs/zoo.md counts convolutions and matrix products alone, fvcore norms and pooling besides.
    counts = counter.by_operator()
    products = sum(counts[kind] for kind in PRODUCTS)
    assert products == pytest.approx(read_counts()[name][1], rel=0.01)
    assert counts.keys() <= {*PRODUCTS, *NO_PRODUCTS}
    # fvcore calls a module uncalled, too, if it computes nothing that is traced.
    uncalled = [part for part in counter.uncalled_modules() if has_weights(model, part)]
    assert uncalled == []


def has_weights(model: nn.Module, name: str) -> bool:
    return any(True for _ in model.get_submodule(name).parameters(recurse=False))


@pytest.mark.parametrize("name", ["softmax_deit_tiny", "rala_vit_nano"])
def test_operations_counted_by_thop(name):
    """thop goes by a layer's class: told that ours convolve, it counts every layer with weights."""
    thop = pytest.importorskip("thop")
    from thop.vision.basic_hooks import count_convNd

    model = timm.create_model(name).eval()
    products = 0

    def count(layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal products
        products += output.numel() * layer.get_parameter("weight")[0].numel()

    x = torch.randn(1, 3, 224, 224)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(x)
    for handle in handles:
        handle.remove()
    rules = {type(m): count_convNd for m in layers if isinstance(m, nn.Conv2d)}
    counted, _ = thop.profile(model, (x,), custom_ops=rules, verbose=False)
    # Norms and attention have no such weights; thop counts some of the former.
    assert counted == pytest.approx(products, rel=0.02)
