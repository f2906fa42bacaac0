"""Time a package of AOTInductor beside its own program, eager and by `torch.compile`.

``python -m linsight.tools.export_speed rala_vit_small --batch-size 64`` replaces its row of the
table in docs/export.md. A name is one of timm's models, or that of a config of a segmentor or
detector. Weights are random, and images uint8, which the program normalises itself.
"""

from __future__ import annotations

import tempfile
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

from linsight.tools.benchmark_timing import quantiles
from linsight.tools.config import load_config
from linsight.tools.docs_table import write_row
from linsight.tools.export import Format, Precision, write_file
from linsight.tools.export_half import lower
from linsight.tools.export_subject import Subject, batch_of, classifier_subject, photographs
from linsight.tools.export_table import build_untrained

HEAD = (
    *("model", "images", "numbers", "device", "package, images/s", "`torch.compile`", "eager"),
    *("torch", "date"),
)


def open_untrained(name: str) -> Subject:
    """A model of random weights, by timm's name or by that of a config."""
    torch.manual_seed(0)
    if timm.is_model(name):
        classifier: Any = timm.create_model(name).eval()
        return classifier_subject(classifier)
    config = load_config(name)
    config.model.backbone.pretrained = False
    return build_untrained(config, name)


def rates(subject: Subject, batch: int, dtype: Precision, seconds: float) -> list[float]:
    """Images per second by the package, by `torch.compile`, and eager."""
    images = batch_of((photographs() * batch)[:batch], subject.size, subject.channels)
    images = images.to(subject.device)
    with tempfile.TemporaryDirectory() as folder:
        written = write_file(subject, Path(folder), Format.aoti, print, dtype=dtype)
        package = torch._inductor.aoti_load_package(str(written.path))
    if dtype is not Precision.float32:
        subject = lower(subject, getattr(torch, dtype.value), [images[:4]])[0]
    compiled = torch.compile(subject.module, dynamic=False)
    found = []
    for run in (package, compiled, subject.module):
        with torch.inference_mode():
            median = quantiles(lambda run=run: run(images), subject.device, seconds)[1]
        found.append(batch / median * 1e3)
    return found


def main(
    name: Annotated[str, typer.Argument(help="A model of timm, or a config.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="Height and width; default: the model's.")
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Of the graph.")] = Precision.bfloat16,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="To repeat each measurement for.")] = 2.0,
) -> None:
    """Write a row of the table in docs/export.md of the checkout in the current folder."""
    subject = open_untrained(name)
    subject = subject.with_size(size or subject.size)
    if device == "cuda":
        subject, machine = subject.for_gpu(batch_size), torch.cuda.get_device_name()
    else:
        machine = f"CPU, {torch.get_num_threads()} threads"
    found = [f"{rate:,.1f}" for rate in rates(subject, batch_size, dtype, seconds)]
    images = f"{batch_size} x {subject.size[0]} x {subject.size[1]}"
    row = [f"`{name}`", images, dtype.value, machine, *found]
    row += [torch.__version__, date.today().isoformat()]
    print(*row, sep="  ", flush=True)
    write_row(row, "export_speed", HEAD, 4, lambda cells: tuple(cells[:4]))


if __name__ == "__main__":
    typer.run(main)
