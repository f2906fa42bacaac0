"""Print the zoo: `linsight models [PATTERN]`."""

import csv
import difflib
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from linsight.backbones import ZOO, zoo
from linsight.backbones.initialization import shapes_only
from linsight.kernels import force

# Counts of every model, written by `python -m linsight.tools.zoo`.
COUNTS = Path(zoo.__file__).with_name("counts.csv")


def models(
    pattern: Annotated[str, typer.Argument(help="Names to list, such as 'rala_*'.")] = "*",
) -> None:
    """List the models: millions of parameters, multiply-adds, published accuracy, weights."""
    names = [name for name in ZOO if fnmatch(name, pattern)]
    if not names:
        near = difflib.get_close_matches(pattern, ZOO) or list(ZOO)[:5]
        print(f"error: no model matches {pattern!r}; there are {', '.join(near)}", file=sys.stderr)
        raise SystemExit(1)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="GMACs at 224 px; top-1 as published, @ another size than 224 px; "
        "* by hand, see linsight convert",
        caption_justify="left",
    )
    for heading in ("model", "M", "GMACs", "top-1", "weights", "arXiv"):
        right = heading in ("M", "GMACs", "top-1")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    counts = read_counts()
    for name in names:
        row = ZOO[name]
        parameters, macs = counts.get(name) or count(name)
        table.add_row(
            name,
            f"{parameters / 1e6:.1f}",
            f"{macs / 1e9:.2f}",
            (f"{row.top1:.1f}" + f"@{row.top1_size}" * (row.top1_size != 224)) if row.top1 else "-",
            "\n".join(tag + "*" * bool(w.page) for tag, w in row.weights.items()) or "-",
            row.family.paper.arxiv,
        )
    Console().print(table)


def read_counts() -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of the models that `COUNTS` lists."""
    with open(COUNTS, newline="") as file:
        return {
            row["model"]: (int(row["parameters"]), int(row["multiply_adds"]))
            for row in csv.DictReader(file)
        }


def count(name: str, size: int = 224) -> tuple[int, int]:
    """Parameters, and multiply-adds of convolutions and matrix products, for one square image."""
    with torch.device("meta"), force("reference"), torch.inference_mode():
        # Parameters that require a gradient would make the counter look for the modules that
        # each tensor comes from.
        with shapes_only():
            model = timm.create_model(name).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
