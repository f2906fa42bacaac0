"""Whether TensorRT's parser takes an ONNX file, by the list of operators that it publishes.

``python -m linsight.tools.export_tensorrt FILE...`` says of each file what the list does not have.

tensorrt_operators.csv has the operators and their dtypes, `refusals` the restrictions, both as
docs/operators.md of the repository onnx/onnx-tensorrt publishes them at its tag release/10.1-GA.
This is no proof that TensorRT builds an engine: it was not at hand.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import onnx
import typer
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from linsight.backbones.checkpoint import CheckpointError
from linsight.tools.run import report_errors

OPSETS = range(9, 21)
# Operators whose results have a size that depends on values.
DATA_DEPENDENT = ("NonMaxSuppression", "NonZero")
_DTYPES: dict[Any, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.DOUBLE: "FP32",  # which the parser makes of it
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
# Inputs that have to be constants.
_CONSTANTS = {"CumSum": 1, "OneHot": 1, "Pad": 3, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1}
_MOST = 3840  # of TopK
_RESIZE = {
    "coordinate_transformation_mode": (
        "half_pixel",
        "pytorch_half_pixel",
        "tf_half_pixel_for_nn",
        "asymmetric",
        "align_corners",
    ),
    "mode": ("nearest", "linear"),
    "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
    "keep_aspect_ratio_policy": ("stretch",),
    "antialias": (0,),
}


@functools.cache
def operators() -> dict[str, tuple[str, ...]]:
    """The dtypes of each operator that TensorRT has."""
    with files("linsight.tools").joinpath("tensorrt_operators.csv").open() as file:
        return {row["operator"]: tuple(row["dtypes"].split()) for row in csv.DictReader(file)}


def refusals(model: ModelProto) -> list[str]:
    """What TensorRT does not take of a graph, each once, in the order of the graph."""
    found = [
        f"opset {entry.version}"
        for entry in model.opset_import
        if not entry.domain and entry.version not in OPSETS
    ]
    graph = model.graph
    values = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    dtypes = {x.name: x.data_type for x in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dtypes[value.name] = value.type.tensor_type.elem_type
    for node in nodes(graph):
        if node.op_type == "Constant":
            values[node.output[0]] = helper.get_attribute_value(node.attribute[0])
        found += _faults(node, values, dtypes)
    return list(dict.fromkeys(found))


def nodes(graph: Any) -> Iterator[NodeProto]:
    """The nodes of a graph and of the graphs in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


def _faults(node: NodeProto, values: dict[str, Any], dtypes: dict[str, int]) -> Iterator[str]:
    name = node.op_type
    if node.domain not in ("", "ai.onnx") or name not in operators():
        yield f"{node.domain}{'.' * bool(node.domain)}{name}"
        return
    # Of Where the first input is the condition.
    inputs = node.input[1:] if name == "Where" else node.input
    data = inputs[0] if inputs else node.output[0]
    dtype = dtypes.get(data)
    if dtype in _DTYPES and _DTYPES[dtype] not in operators()[name]:
        yield f"{name} of {_DTYPES[dtype]}"
    options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    place = 1 if name.startswith("Reduce") else _CONSTANTS.get(name)
    given = node.input[place] if place is not None and len(node.input) > place else ""
    if given and given not in values:
        yield f"{name} with an input {place} that is no constant"
    if name == "Resize":
        for key, allowed in _RESIZE.items():
            value = options.get(key, allowed[0])
            value = value.decode() if isinstance(value, bytes) else value
            if value not in allowed:
                yield f"Resize with {key} {value}"
    if name == "ScatterND" and options.get("reduction", b"none") != b"none":
        yield "ScatterND with a reduction"
    if name in ("AveragePool", "LpPool", "MaxPool") and set(options.get("dilations", ())) - {1}:
        yield f"{name} with dilations"
    if name == "MaxPool" and len(node.output) > 1:
        yield "MaxPool with indices"
    if name == "TopK":
        count = values.get(node.input[1])
        if count is None or not options.get("sorted", 1) or int(count[0]) >= _MOST:
            yield f"TopK that is unsorted, of {_MOST} or more, or of a number that is no constant"
    if name in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
        zero = values.get(node.input[2])
        if zero is None or zero.any():
            yield f"{name} with a zero point"


def main(file: Annotated[list[Path], typer.Argument(help="ONNX files.")]) -> None:
    """Say what TensorRT's published list does not have of exported files."""
    with report_errors():
        refused = False
        for each in file:
            model = onnx.load(each)
            missing = refusals(model)
            refused |= bool(missing)
            free = sorted({n.op_type for n in nodes(model.graph)} & set(DATA_DEPENDENT))
            print(f"{each}: {'; '.join(missing) or 'every operator is in the list'}")
            if free:
                print(f"  {', '.join(free)}: the size of the result depends on values")
        if refused:
            raise CheckpointError("TensorRT's list lacks what is named above")


if __name__ == "__main__":
    typer.run(main)
