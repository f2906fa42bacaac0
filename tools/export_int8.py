"""Graphs whose linear layers and convolutions have eight bits, by ONNX Runtime's quantiser.

Products of two activations, the cores of attention, stay in float, as do norms, softmax and what
follows a head: the sums of linear attention grow with the number of tokens, and boxes need more
than 256 values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from linsight.tools.export_onnx import entries


class _Images(CalibrationDataReader):
    """Feeds images (B, C, H, W) to the quantiser."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self.batches, None)
        return None if images is None else {"images": images.numpy()}


def quantize_file(file: Path, batches: Iterable[Tensor] | None) -> int:
    """Replace a model's graph in float32 by one of eight bits; see `quantize`."""
    target = file.with_name(f"int8.{file.name}")
    layers = quantize(file, target, batches)
    target.replace(file)
    return layers


def describe(file: Path, description: dict[str, Any]) -> None:
    """Write a description into an ONNX file, in the place of what is there."""
    model = onnx.load(file)
    onnx.helper.set_model_props(model, entries(description))
    onnx.save(model, file)


def quantize(file: Path, target: Path, batches: Iterable[Tensor] | None) -> int:
    """Write a graph in float32 as one whose layers have weights and inputs of eight bits.

    Weights have one scale per output channel. The scales of inputs are those of the range that
    they have on the images or, without images, are computed in each run; then convolutions, whose
    operator has one scale for all weights, stay in float32.

    Weights use seven of their eight bits: without VNNI, x86 adds pairs of products in 16 bits.

    Args:
        file: the graph, as ONNX.
        target: where the new graph goes, in ONNX's QDQ format or, without images, with
            MatMulInteger.
        batches: uint8 images (B, C, H, W).

    Returns:
        How many layers have eight bits.
    """
    folded = target.with_name(f"{target.stem}.folded.onnx")
    quant_pre_process(str(file), str(folded), skip_symbolic_shape=True)
    try:
        # The quantiser of inputs that each run measures takes Gemm for MatMul, and renames it.
        kinds = ("Gemm", "MatMul") if batches is None else ("Conv", "Gemm", "MatMul")
        layers, others = _split(onnx.load(folded), kinds)
        options = {
            "op_types_to_quantize": list(kinds),
            "nodes_to_exclude": others,
            "per_channel": True,
            "reduce_range": True,
            "weight_type": QuantType.QInt8,
        }
        if batches is None:
            quantize_dynamic(folded, target, **options)
        else:
            quantize_static(
                folded,
                target,
                _Images(batches),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                **options,
            )
        _copy_description(file, target)
    finally:
        folded.unlink()
    return len(layers)


def _copy_description(file: Path, target: Path) -> None:
    """The quantiser adds entries of its own."""
    model, original = onnx.load(target), onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(model, {e.key: e.value for e in original.metadata_props})
    onnx.save(model, target)


def _split(model: onnx.ModelProto, kinds: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of the linear layers and convolutions, and of the other nodes of these kinds.

    A product with a constant of more than two dimensions, such as one matrix per head, belongs to
    the core of attention.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    layers, others = [], []
    for node in model.graph.node:
        if node.op_type in kinds:
            rank = ranks.get(node.input[1])
            is_layer = node.input[0] not in ranks and (
                rank is not None if node.op_type == "Conv" else rank == 2
            )
            (layers if is_layer else others).append(node.name)
    return layers, others
