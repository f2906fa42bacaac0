"""Graphs of PyTorch whose linear layers and convolutions have eight bits, by torchao's PT2E."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

_LINEAR = torch.ops.aten.linear.default
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)


class LayerQuantizer(Quantizer):
    """Gives eight bits to what multiplies an activation by a weight.

    torchao's own quantisers take products of two activations as well, and know layers by the
    classes of their modules.

    Args:
        dynamic: whether each run measures the inputs; then convolutions stay in float32, for which
            PyTorch has no such operator.

    Attributes:
        layers: how many layers of the graph have eight bits.
    """

    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        self.layers = 0
        self.kinds = (_LINEAR,) if dynamic else (_LINEAR, *_CONVOLUTIONS)
        observer = PlaceholderObserver if dynamic else MinMaxObserver
        # Of the smallest scale; without it a channel of zeros would divide by almost nothing.
        least = {"eps": 2**-12}
        self.inputs = QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=observer.with_args(**least),
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
            is_dynamic=dynamic,
        )
        self.weights = QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(**least),
            quant_min=-64,
            quant_max=63,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.op == "call_function" and node.target in self.kinds:
                x, weight = node.args[:2]
                if _is_constant(weight) and not _is_constant(x):
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        {x: self.inputs, weight: self.weights}, _annotated=True
                    )
                    self.layers += 1
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing can be wrong: `annotate` has seen each node."""


def _is_constant(node: Node) -> bool:
    """Whether a value depends on no input of the graph."""
    if node.op == "call_function":
        return bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes))
    return node.op == "get_attr"


def quantize(program: ExportedProgram, batches: Iterable[Tensor] | None) -> tuple[nn.Module, int]:
    """A graph in float32 as one whose linear layers and convolutions have eight bits.

    Weights have one scale per output channel, and use seven of their eight bits: without VNNI, x86
    adds pairs of products in 16 bits. The scales of inputs are those of the range that they have on
    the images or, without images, are computed in each run of the linear layers alone.

    Args:
        program: the graph, of images.
        batches: uint8 images (B, C, H, W).

    Returns:
        The module, to be traced again, and how many of its layers have eight bits.
    """
    quantizer = LayerQuantizer(dynamic=batches is None)
    prepared = prepare_pt2e(program.module(), quantizer)
    # The weights are measured in a run, too.
    shown = cast(Any, program.example_inputs)[0] if batches is None else batches
    with torch.no_grad():
        for images in shown:
            prepared(images)
    module = convert_pt2e(prepared)
    _remove_unused(module)
    return module, quantizer.layers


def _remove_unused(module: GraphModule) -> None:
    """Remove the weights in float32, which the graph no longer reads."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in {*dict(module.named_parameters()), *dict(module.named_buffers())} - read:
        holder, _, last = name.rpartition(".")
        delattr(module.get_submodule(holder), last)
