"""Write the weights in an ONNX file as safetensors: `python -m linsight.tools.onnx_weights`.

PyTorch's exporter keeps the names of most weights, but not those of linear layers without their
bias, whose matrices it transposes, and of tables that it has cut. The nodes that read them have the
layers' names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from linsight.tools.run import report_errors

app = typer.Typer()


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="An ONNX file of a DINOv2 of transformers.")],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    half: Annotated[bool, typer.Option("--half", help="Write float16.")] = False,
) -> None:
    """Write the weights in an ONNX file as safetensors, under the names of its layers."""
    with report_errors():
        weights = read_onnx(file)
        dtype = torch.float16 if half else torch.float32
        save_file({name: w.to(dtype).contiguous() for name, w in weights.items()}, out)
        count = sum(w.numel() for w in weights.values())
        print(f"{out}: {len(weights)} tensors, {count:,} values")


def open_onnx(file: Path) -> Any:
    """The model in an ONNX file.

    Raises:
        ValueError: the file is of another kind, or damaged.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(file)
    except DecodeError as error:
        raise ValueError(f"{file} is not an ONNX file, or damaged") from error
    if not model.graph.node:
        raise ValueError(f"{file} is not an ONNX file, or holds no model")
    return model


def read_onnx(file: Path) -> dict[str, Tensor]:
    """The weights in an ONNX file that `torch.onnx` has exported from transformers' DINOv2.

    Returns:
        The weights under the names of the exported modules. The position embeddings, which the
        file holds in two parts, are one tensor.

    Raises:
        ValueError: if a weight has no name and no layer that has one, or as `open_onnx` raises it.
    """
    from onnx.numpy_helper import to_array

    graph = open_onnx(file).graph
    values = {one.name: torch.from_numpy(to_array(one).copy()) for one in graph.initializer}
    unnamed = {name for name in values if name.startswith("onnx::")}
    weights = {name: value for name, value in values.items() if name not in unnamed}
    positions: dict[str, list[Tensor]] = {}
    for node in graph.node:
        layer = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        for name in unnamed.intersection(node.input):
            if node.op_type == "MatMul":
                weights[f"{layer}.weight"] = values[name].T
            elif node.op_type in ("Concat", "Reshape"):
                # The class token's position is joined to those of the patches behind it.
                positions.setdefault(f"{layer}.position_embeddings", []).append(values[name])
            else:
                raise ValueError(f"{file}: weight {name} is read by {node.op_type}, not by a layer")
    for name, parts in positions.items():
        weights[name] = torch.cat(sorted(parts, key=lambda part: part.shape[1]), 1)
    return weights


if __name__ == "__main__":
    app()
