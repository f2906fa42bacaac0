"""Look through a user's data before training: `linsight check DATA`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchvision.transforms.v2 import functional as pixelwise

from linsight.data.masks import IGNORE, label_table, read_mask
from linsight.data.pictures import read_picture
from linsight.data.source_check import Report, check_source
from linsight.data.sources import Sample, Source, Task, read_source
from linsight.heads.segmentation_figures import legend, overlay
from linsight.tools.config import ConfigError
from linsight.tools.run import report_errors

DataPath = Annotated[
    str,
    typer.Argument(
        help="A folder, or a file of annotations: a folder for each class, COCO, YOLO, Pascal "
        "VOC, images and masks, a CSV file, hfds/NAME."
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(help=f"Where the data leave a choice: {', '.join(get_args(Task))}."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the split, where the data have none.")]


def check(
    data: DataPath,
    task: TaskOption = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Where the drawn samples go.")] = Path("samples.png"),
) -> None:
    """Look through data: classes, sizes, faults; and draw some images with their labels."""
    with report_errors():
        source = read_source(data, check_task(task), seed)
        report = inspect_data(source)
        if source.splits:
            draw_samples(source, report, out)
            print(f"Samples with their labels: {out}")
        if report.corrupt or report.masks:
            raise SystemExit(1)


def check_task(task: str | None) -> Task | None:
    """The task of a command line.

    Raises:
        ConfigError: there is no such task.
    """
    if task is not None and task not in get_args(Task):
        raise ConfigError(f"--task is {task!r}, expected one of {', '.join(get_args(Task))}")
    return task  # pyright: ignore[reportReturnType]


def inspect_data(source: Source, console: Console | None = None) -> Report:
    """Check data, and print what they are and which faults they have."""
    console = console or Console()
    console.print(f"{source.path}: {source.format}, for {source.task}", highlight=False)
    report = check_source(
        source,
        lambda items, total: track(
            items, "Looking through the images", total, console=console, transient=True
        ),
    )
    for note in source.notes:
        console.print(f"  {note}", highlight=False)
    if source.splits:
        console.print(_table(source, report))
        if report.sizes:
            short, long = report.median_size
            console.print(
                f"  images of {short} x {long} pixels in the middle, the sides from "
                f"{min(map(min, report.sizes))} to {max(map(max, report.sizes))}",
                highlight=False,
            )
    else:
        console.print(f"  {len(source.classes)} classes", highlight=False)
    for fault in report.faults():
        console.print(f"  [bold]warning:[/bold] {fault}", highlight=False)
    if not report.decoded:
        console.print("  so many images are not decoded: only their headers and ends were read")
    return report


def _table(source: Source, report: Report) -> Table:
    unit = {"classification": "images", "segmentation": "pixels"}.get(source.task, "objects")
    table = Table("class")
    for split, images in report.images.items():
        table.add_column(f"{split}: {unit}\nof {images} images", justify="right")
    shown = min(len(source.classes), 30)
    totals = {split: max(1, sum(counts)) for split, counts in report.counts.items()}
    for index, name in enumerate(source.classes[:shown]):
        counts = {split: report.counts[split][index] for split in report.images}
        table.add_row(
            name,
            *(
                f"{count / totals[split]:.1%}" if unit == "pixels" else f"{count:,}"
                for split, count in counts.items()
            ),
        )
    if shown < len(source.classes):
        table.add_row(f"and {len(source.classes) - shown} more", *("" for _ in report.images))
    return table


def draw_samples(
    source: Source, report: Report, file: Path, rows: int = 3, columns: int = 4
) -> None:
    """Draw some training images with their labels into a file. The first two are of those, if any,
    that EXIF turns in a way that the sizes of labels do not tell."""
    samples = source.splits["train"]
    # Evenly over the data, whose order often is that of the classes.
    places = np.linspace(0, len(samples) - 1, min(len(samples), rows * columns)).astype(int)
    drawn = [samples[place] for place in places]
    known = set(map(id, samples))  # of 100,000, among which == would look for long
    unknown = [sample for sample in report.turned["unknown"] if id(sample) in known][:2]
    drawn = [*unknown, *(s for s in drawn if s not in unknown)][: len(drawn)]
    columns = min(columns, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(3 * columns, 3 * rows + 0.4), layout="constrained")
    present: set[int] = set()
    for axes, sample in zip(
        figure.subplots(rows, columns, squeeze=False).flat, drawn, strict=False
    ):
        try:
            picture, title, labels = _draw(source, sample, report.upright)
        except Exception as error:  # a damaged file, which the report names
            axes.set_title(str(error)[:30], fontsize=8)
            continue
        axes.imshow(picture)
        axes.set_title(title, fontsize=9)
        present |= labels
    for axes in figure.axes:
        axes.axis("off")
    if source.task == "segmentation" and (handles := legend(source.classes, present)):
        figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _draw(source: Source, sample: Sample, upright: bool) -> tuple[Any, str, set[int]]:
    """A sample's picture with its label, its title, and the classes in a mask."""
    if source.task == "classification":
        picture = read_picture(sample.file)
        return picture, source.classes[sample.label][:30], set()
    title = sample.file.name[:30]
    if source.task == "segmentation":
        table = label_table(source.label_map or {}, IGNORE)
        mask = read_mask(sample.label)
        picture = read_picture(sample.file, mask.shape[::-1], upright)
        labels = torch.from_numpy(table[mask])
        drawn = overlay(pixelwise.pil_to_tensor(picture), labels, source.classes)
        return drawn.permute(1, 2, 0).numpy(), title, {*labels.unique().tolist()} - {IGNORE}
    from linsight.heads.detection_figures import draw_objects

    picture = read_picture(sample.file, sample.size, upright)
    boxes = np.array([obj["bbox"] for obj in sample.label], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([obj["label"] for obj in sample.label], int)
    drawn = draw_objects(np.array(picture), boxes, labels, names=source.classes)
    return drawn, title, set()
