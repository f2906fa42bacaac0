"""Quantise a shallow model of each body, and write the table of eight bits in docs/export.md.

``python -m linsight.tools.export_int8_table [BODY...]`` replaces the rows of these bodies. A model
has one block per stage and random weights. It is calibrated on the photographs that installed
packages ship for training, and compared with itself in float32 on those for validation.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from linsight.kernels import force
from linsight.tools.docs_table import write_row
from linsight.tools.export import Format, calibration_images, save, trace
from linsight.tools.export_check import EIGHT, compare
from linsight.tools.export_file import open_file
from linsight.tools.export_int8 import quantize_file
from linsight.tools.export_subject import Subject, batch_of
from linsight.tools.export_table import bodies, subject_of
from linsight.tools.photographs import collect
from linsight.tools.predict import find_pictures, open_picture

HEAD = (
    "body",
    "model",
    "calibrated: layers",
    "relative error",
    "same class",
    "not calibrated: layers",
    "relative error",
    "same class",
)


def results_of(subject: Subject, photographs: Path) -> list[str]:
    """Layers, relative error of the logits and share of pictures of the same class, of a model
    calibrated on photographs and of one that is not."""
    subject = subject.with_size(subject.size)
    shown = [open_picture(file) for file in find_pictures([photographs / "val"])]
    images = batch_of(shown, subject.size, subject.channels)
    cells = []
    with tempfile.TemporaryDirectory() as folder, force("reference"):
        whole, file = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        program, _ = trace(subject)
        description = subject.description | {"dtype": "int8", "image_size": subject.size}
        save(program, whole, Format.onnx, subject.outputs, description)
        for pictures in (find_pictures([photographs / "train"]), []):
            shutil.copy(whole, file)
            images_seen = calibration_images(subject, subject.size, pictures)
            layers = quantize_file(file, images_seen)
            difference = compare(subject.module, open_file(file).run, [images], EIGHT)
            cells += [str(layers), *(f"{value:.3f}" for value in difference.values.values())]
    return cells


def main(
    body: Annotated[list[str] | None, typer.Argument(help="Skeletons; default: all.")] = None,
) -> None:
    """Write rows of the table in docs/export.md of the checkout in the current folder."""
    order = list(bodies())
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder)
        collect(photographs)
        for skeleton, model in bodies().items():
            if body and skeleton not in body:
                continue
            try:
                cells = results_of(subject_of(model, "classification", True), photographs)
            # Exporter and runtime have errors of their own.
            except Exception as error:
                cells = [f"fails: {str(error).strip().splitlines()[0]}", *[""] * 5]
            row = [skeleton, f"`{model}`", *cells]
            print(*row, sep="  ", flush=True)
            write_row(row, "export_int8_table", HEAD, 1, lambda cells: order.index(cells[0]))


if __name__ == "__main__":
    typer.run(main)
