"""Classify pictures: `linsight predict MODEL PICTURE_OR_FOLDER...`."""

import csv
import sys
from pathlib import Path
from typing import Annotated

import timm.data
import torch
import typer
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.data import get_img_extensions

from linsight.datasets.classification import DataError
from linsight.tools.model import class_names, open_model
from linsight.tools.run import plain_errors


def predict(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint, an exported folder, or a model with published weights."),
    ],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    model_name: Annotated[
        str | None, typer.Option("--model", help="timm's name, where MODEL does not say it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the drawings and the list go.")] = Path(
        "predictions"
    ),
    topk: Annotated[int, typer.Option(min=1, help="Classes to name for each picture.")] = 5,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; default: a GPU if there is one.")
    ] = None,
) -> None:
    """Name the likeliest classes of pictures, and draw each picture beside them."""
    with plain_errors():
        classifier = open_model(model, model_name)
        files = _pictures(pictures)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        classifier.to(device)
        names = class_names(classifier)
        settings = timm.data.resolve_model_data_config(classifier)
        transform = timm.data.create_transform(**settings)
        out.mkdir(parents=True, exist_ok=True)
        console = Console()
        table = Table("picture", "prediction")
        rows, unreadable = [], []
        for file in track(files, "Classifying", console=console, disable=len(files) == 1):
            try:
                picture = Image.open(file).convert("RGB")
            # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... by format.
            except Exception as error:
                unreadable.append(f"{file} ({error})")
                continue
            with torch.inference_mode():
                scores = classifier(transform(picture)[None].to(device))[0].float().softmax(-1)
            top = scores.topk(min(topk, len(names)))
            best = [
                (names[i], p)
                for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            table.add_row(str(file), ", ".join(f"{name} {p:.1%}" for name, p in best[:3]))
            rows += [(str(file), name, f"{p:.6f}") for name, p in best]
            draw_prediction(picture, best).savefig(_drawing(out, file, files), dpi=120)
        with open(out / "predictions.csv", "w", newline="") as list_file:
            csv.writer(list_file).writerows([("picture", "class", "probability"), *rows])
        console.print(table)
        if unreadable:
            print(
                f"warning: {len(unreadable)} of {len(files)} pictures could not be read: "
                + ", ".join(unreadable[:5]),
                file=sys.stderr,
            )
        if len(unreadable) == len(files):
            raise DataError("no picture could be read")
        console.print(f"Drawings and predictions.csv are in {out}")


def _pictures(sources: list[Path]) -> list[Path]:
    files = []
    for source in sources:
        if source.is_dir():
            found = sorted(f for f in source.rglob("*") if f.suffix.lower() in get_img_extensions())
            if not found:
                raise DataError(
                    f"folder {source} holds no pictures ({', '.join(get_img_extensions())})"
                )
            files += found
        elif source.is_file():
            files.append(source)
        else:
            raise FileNotFoundError(f"picture {source} does not exist")
    return files


def _drawing(out: Path, file: Path, files: list[Path]) -> Path:
    """Named as the picture; with its folder where two pictures are called the same."""
    alone = sum(other.stem == file.stem for other in files) == 1
    return out / f"{file.stem if alone else '_'.join(file.with_suffix('').parts[-2:])}.png"


def draw_prediction(picture: Image.Image, best: list[tuple[str, float]]) -> Figure:
    """A picture beside bars of its likeliest classes.

    Args:
        picture: as it was read.
        best: names and probabilities, the likeliest first.
    """
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    left.imshow(picture, interpolation="nearest" if max(picture.size) < 200 else None)
    left.axis("off")
    names, shares = zip(*reversed(best), strict=True)
    bars = right.barh([name[:28] for name in names], shares, color="#2a6f97")
    right.bar_label(bars, [f"{share:.1%}" for share in shares], padding=3)
    right.set(xlim=(0, 1.18), xticks=[])
    right.spines[["top", "right", "bottom"]].set_visible(False)
    return figure
