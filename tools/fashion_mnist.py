"""Lay Fashion-MNIST out as folders of classes: `python -m linsight.tools.fashion_mnist`.

Its 70,000 photographs of products, 28 x 28 and grey, come as four files of the IDX format, which
MNIST and its relatives share.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from linsight.data.loading import DataError
from linsight.tools.run import report_errors

CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
HELD_OUT = 12  # One training image in so many validates.

app = typer.Typer()


@app.command()
def main(
    source: Annotated[
        Path, typer.Argument(help="Folder of the four files train-* and t10k-*, gzipped or not.")
    ],
    folder: Annotated[Path, typer.Argument(help="Gets train/, val/ and test/.")],
) -> None:
    """Write the photographs as PNG files, in a folder for each class.

    Validation takes every twelfth training image, so that the test images choose no checkpoint.
    """
    with report_errors():
        for prefix, split in (("train", "train"), ("t10k", "test")):
            images = read_idx(source, f"{prefix}-images", 3)
            labels = read_idx(source, f"{prefix}-labels", 1)
            if len(images) != len(labels) or labels.max(initial=0) >= len(CLASSES):
                raise DataError(
                    f"{source}: {prefix} has {len(images)} images and {len(labels)} labels from 0 "
                    f"to {labels.max(initial=0)}, expected one from 0 to 9 for each image"
                )
            numbered = enumerate(zip(images, labels, strict=True))
            for number, (image, label) in track(numbered, split, len(images)):
                held_out = split == "train" and number % HELD_OUT == HELD_OUT - 1
                place = folder / ("val" if held_out else split) / CLASSES[label]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(place / f"{number:05}.png")


def read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """The bytes in a file of the IDX format.

    Args:
        folder: where the file lies.
        name: how the file's name begins.
        dimensions: number of axes to expect.

    Returns:
        A uint8 array with the shape that the file says.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    files = sorted(folder.glob(f"{name}*"))
    if not files:
        raise DataError(f"{folder} has no file {name}-idx{dimensions}-ubyte or one with .gz")
    opened = gzip.open if files[0].suffix == ".gz" else open
    with opened(files[0], "rb") as file:
        content = file.read()
    # Two zeros, the type (8 is of unsigned bytes), the number of axes, and a length for each.
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < start:
        raise DataError(f"{files[0]} is not an IDX file of bytes with {dimensions} axes")
    shape = np.frombuffer(content[4:start], ">u4")
    if len(content) - start != np.prod(shape):
        raise DataError(f"{files[0]} is cut short: it says {tuple(shape.tolist())}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


if __name__ == "__main__":
    app()
