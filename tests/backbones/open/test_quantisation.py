"""Quantisation by torchao, by PT2E and by PyTorch."""

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from ..conftest import lively
from .models import (
    PARTS,
    SKELETONS,
    create,
    distance,
    give,
    images,
    of_type,
    quick,
    two_blocks,
)


def float32(name: str, **arguments) -> tuple[nn.Module, Tensor]:
    """A model as it is quantised, with its constants folded, and its images."""
    return reparameterize_model(lively(create(name, **arguments))), images().float()


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
@pytest.mark.parametrize("name", PARTS)
@torch.inference_mode()
def test_torchao_quantises_each_linear_layer(name, config):
    from torchao import quantization
    from torchao.utils import TorchAOBaseTensor

    model, x = float32(name, **two_blocks(name))
    wanted = model(x)
    quantization.quantize_(model, getattr(quantization, config)())
    linear = of_type(model, nn.Linear)
    assert [n for n, m in linear.items() if not isinstance(m.weight, TorchAOBaseTensor)] == []
    assert 0 < distance(model(x), wanted) < 0.1


@pytest.mark.parametrize("name", PARTS)
@torch.inference_mode()
def test_a_quantised_model_is_folded(name):
    """A quantised weight cannot be multiplied in place: what would be folded into it stays."""
    from torchao import quantization

    model, x = lively(create(name, **two_blocks(name))), images(1).float()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    wanted = model(x)
    assert distance(reparameterize_model(model)(x), wanted) < 1e-4


@pytest.mark.parametrize("name", PARTS)
@torch.inference_mode()
def test_dynamic_quantisation_replaces_each_linear_layer(name):
    """PyTorch's function takes layers of the class `nn.Linear` itself: those before folding."""
    model, x = lively(create(name, **two_blocks(name))), images().float()
    wanted = model(x)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    found = of_type(quantized, torch.ao.nn.quantized.dynamic.Linear)
    assert set(found) == set(of_type(model, nn.Linear))
    assert of_type(quantized, nn.Linear) == {}
    got = quantized(x)
    assert distance(got, wanted) > 0
    # The error of eight bits is PyTorch's: the model is to compute what these layers give.
    for layer, part in of_type(model, nn.Linear).items():
        part.register_forward_hook(give(found[layer]))
    torch.testing.assert_close(got, model(x))
    # An input beside the edge of a step may be rounded to the other one.
    assert distance(reparameterize_model(quantized)(x), got) < 0.05


@pytest.mark.parametrize("name", quick(SKELETONS, ["mala_vit_nano", "van_b0"]))
def test_pt2e_quantises_each_convolution_and_linear_layer(name):
    from torchao.quantization.pt2e import quantize_pt2e as pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, x = float32(name, **two_blocks(name))
    with torch.no_grad():
        wanted = model(x)
    quantizer = x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config()
    )
    # Without `strict` a program tells the quantiser no functions, only the classes of modules, of
    # which it knows PyTorch's own convolution but none that derives from it.
    program = torch.export.export(model, (x,), strict=True)
    prepared = pt2e.prepare_pt2e(program.module(), quantizer)
    prepared(x)
    quantized = pt2e.convert_pt2e(prepared, fold_quantize=False)
    weights = {
        node.args[0].target
        for node in quantized.graph.nodes
        if node.target is torch.ops.quantized_decomposed.quantize_per_channel.default
    }
    layers = of_type(model, (nn.Linear, nn.Conv2d))
    assert {f"{name}.weight" for name in layers} - weights == set()
    with torch.no_grad():
        assert 0 < distance(quantized(x), wanted) < 0.1
