"""Graphs of eight bits: linear layers and convolutions in int8, all else in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.fx import GraphModule, Node

# More of them hardly change the ranges of activations.
MOST_PICTURES = 128


class Bits(str, Enum):
    """When the ranges of activations are measured."""

    static = "static"
    dynamic = "dynamic"


@contextmanager
def progress(batches: Sequence[Tensor]) -> Iterator[Iterable[Tensor]]:
    """The batches, with a bar on the standard error."""
    with Progress(console=Console(stderr=True)) as bar:
        yield bar.track(batches, description="Calibrating")


def quantize_graph(module: nn.Module, bits: Bits, batches: Sequence[Tensor]) -> nn.Module:
    """The module of a `torch.export` graph with its layers in eight bits, by torchao's PT2E.

    Weights are int8 per output channel. Activations are uint8 with a range per tensor, which is
    measured on the batches (static) or on each input (dynamic).

    Args:
        module: what `ExportedProgram.module` returns.
        bits: static or dynamic.
        batches: images to measure ranges on; dynamic ranges need one batch.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(module, _layer_quantizer(bits))
    with torch.no_grad(), progress(batches[:1] if bits is Bits.dynamic else batches) as shown:
        for images in shown:
            prepared(images)
    return convert_pt2e(prepared)


def _layer_quantizer(bits: Bits) -> Any:
    from torchao.quantization.pt2e import (
        HistogramObserver,
        PerChannelMinMaxObserver,
        PlaceholderObserver,
    )
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
    )

    dynamic = bits is Bits.dynamic
    observer = PlaceholderObserver if dynamic else HistogramObserver
    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        is_dynamic=dynamic,
        observer_or_fake_quant_ctr=observer,
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
    )

    class LayerQuantizer(Quantizer):
        """Marks every linear layer and convolution, by the operator that computes it."""

        def annotate(self, model: GraphModule) -> GraphModule:
            for node in layers_of(model):
                inputs: Any = node.args[:2]
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={inputs[0]: activation, inputs[1]: weight}, _annotated=True
                )
            return model

        def validate(self, model: GraphModule) -> None:
            """Nothing: what it marks, PT2E can quantise."""

    return LayerQuantizer()


def layers_of(model: GraphModule) -> list[Node]:
    """The nodes of a graph that are linear layers or convolutions with weights of their own."""
    kinds = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
    nodes = [node for node in model.graph.nodes if node.target in kinds]
    return [n for n in nodes if isinstance(n.args[1], Node) and n.args[1].op == "get_attr"]


def quantize_onnx(source: Path, target: Path, bits: Bits, batches: Sequence[Tensor]) -> None:
    """Write an ONNX file with its layers in eight bits, for ONNX Runtime.

    Static ranges stand in QuantizeLinear and DequantizeLinear nodes (QDQ), which other runtimes
    know, too. Dynamic ones are for matrix products alone, as ONNX Runtime has them.
    """
    import onnx
    from onnxruntime import quantization

    model = onnx.load(source)
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = [
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights
    ]
    if bits is Bits.dynamic:
        quantization.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["Gemm", "MatMul"],
            nodes_to_quantize=nodes,
            per_channel=True,
        )
        return
    with progress(batches) as shown:
        quantization.quantize_static(
            source,
            target,
            _reader(shown),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


def _reader(batches: Iterable[Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.batches, None)
            return None if images is None else {"images": images.numpy()}

    return Reader()
