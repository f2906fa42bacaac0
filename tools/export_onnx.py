"""Graphs as ONNX: the operators that PyTorch's exporter lacks, names, and the description."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import onnx_ir
import onnxscript
import torch
from torch import Tensor
from torch.export import ExportedProgram

from linsight.backbones.checkpoint import CheckpointError
from linsight.heads import deployment

# The newest that both ONNX Runtime and OpenVINO run whole.
OPSET = 18
# Bytes of weights; those of larger graphs PyTorch's exporter writes beside the file.
MOST = 1536 * 2**20
op: Any = onnxscript.opset18


@torch.library.custom_op("linsight::suppress", mutates_args=())
def _operator(boxes: Tensor, scores: Tensor, overlap: float, least: float, most: int) -> Tensor:
    return deployment.suppress(boxes, scores, overlap, least, most)


def suppress(boxes: Tensor, scores: Tensor, overlap: float, least: float, most: int) -> Tensor:
    """Non-maximum suppression that ONNX's own operator computes in a file.

    It is a function, because a module that holds an operator cannot be copied.
    """
    return _operator(boxes, scores, overlap, least, most)


@_operator.register_fake
def _(boxes: Tensor, scores: Tensor, overlap: float, least: float, most: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _suppress(boxes: Any, scores: Any, overlap: float, least: float, most: int) -> Any:
    """(image, class, box) of the boxes kept, scattered to (B, N)."""
    chosen = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, [1]), most, overlap, least)
    places = op.Gather(chosen, [0, 2], axis=1)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(places, start=0, end=1))
    kept = op.ScatterND(op.Mul(scores, op.Constant(value_float=0.0)), places, ones)
    return op.Greater(kept, op.Constant(value_float=0.5))


def _floor_divide(x: Any, divisor: Any) -> Any:
    """PyTorch's own translation compares booleans, which TensorRT does not."""
    if x.dtype.is_floating_point():
        return op.Floor(op.Div(x, divisor))
    return op.Div(op.Sub(x, op.Mod(x, divisor)), divisor)


def save(
    program: ExportedProgram, file: Path, outputs: Sequence[str], description: dict[str, Any]
) -> None:
    """Write a graph as ONNX, with its description as entries of ``metadata_props``.

    Raises:
        CheckpointError: its weights are more than one file of ONNX holds.
    """
    held = (*program.state_dict.values(), *program.constants.values())
    weights = sum(x.nbytes for x in held if isinstance(x, Tensor))
    if weights > MOST:
        raise CheckpointError(
            f"the weights have {weights / 1e9:.1f} GB, and one file of ONNX holds "
            f"{MOST / 1e9:.1f}: export with --dtype float16, or --to torch"
        )
    exported = cast(
        torch.onnx.ONNXProgram,
        torch.onnx.export(
            program,
            input_names=["images"],
            output_names=list(outputs),
            opset_version=OPSET,
            custom_translation_table={
                torch.ops.linsight.suppress.default: _suppress,
                torch.ops.aten.floor_divide.default: _floor_divide,
            },
            dynamo=True,
            verbose=False,
        ),
    )
    model = exported.model
    _read_pixels_once(model.graph)
    _name_dimensions(model)
    model.metadata_props.update(entries(description))
    exported.save(file)


def _read_pixels_once(graph: Any) -> None:
    """Let what reads the images read their first cast, as TensorRT can only cast uint8."""
    (images,) = graph.inputs
    readers = images.consumers()
    (cast, *others) = (node for node in graph if node in readers and node.op_type == "Cast")
    first = next(iter(graph))
    if cast is not first:
        graph.remove(cast)
        graph.insert_before(first, cast)
    for node in readers:
        if node is not cast and node not in others:
            for place, value in enumerate(node.inputs):
                if value is images:
                    node.replace_input_with(place, cast.outputs[0])


def entries(description: dict[str, Any]) -> dict[str, str]:
    """The description as entries of ``metadata_props``."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in description.items()
    }


def _name_dimensions(model: Any) -> None:
    """Call the free dimensions batch, height and width, as PyTorch's symbols say nothing."""
    (images,) = model.graph.inputs
    names = {
        str(symbol.value): name
        for symbol, name in zip(images.shape, ("batch", "channels", "height", "width"), strict=True)
        if not isinstance(symbol, int)
    }
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = _renamed(value.shape, names)


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _renamed(shape: Any, names: dict[str, str]) -> Any:
    def rename(dimension: Any) -> Any:
        if isinstance(dimension, int) or dimension.value is None:
            return dimension
        text = str(dimension.value)
        return re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), text)

    return onnx_ir.Shape([rename(dimension) for dimension in shape])
