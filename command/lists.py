"""Print the zoo, `linsight models [PATTERN]`, and the configs, `linsight configs [PATTERN]`."""

import csv
import difflib
import sys
from collections.abc import Collection
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table


def find_folders() -> Path:
    """The folder in which backbones/, configs/ and the others lie; linsight is not imported.

    Raises:
        ModuleNotFoundError: linsight is not installed.
    """
    package = find_spec("linsight")
    path = package.submodule_search_locations if package else []
    # An editable installation has a finder of its own, beside that of the folders in sys.path.
    for finder in sys.meta_path:
        spec = finder.find_spec("linsight.backbones", path)
        if spec is not None and spec.origin:
            return Path(spec.origin).parents[1]
    raise ModuleNotFoundError("linsight is not installed", name="linsight")


def read_zoo() -> list[dict[str, str]]:
    """The rows of the zoo as `python -m linsight.tools.zoo` wrote them: a model each, with its
    parameters and multiply-adds, published accuracy, tags of weights, and paper."""
    with (find_folders() / "backbones" / "zoo" / "counts.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def models(
    pattern: Annotated[str, typer.Argument(help="Names to list, such as 'rala_*'.")] = "*",
) -> None:
    """List the models: millions of parameters, multiply-adds, published accuracy, weights."""
    rows = {row["model"]: row for row in read_zoo()}
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="GMACs at 224 px; top-1 as published, @ another size than 224 px; "
        "* by hand, see linsight convert",
        caption_justify="left",
    )
    for heading in ("model", "M", "GMACs", "top-1", "weights", "arXiv"):
        right = heading in ("M", "GMACs", "top-1")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for name in _match("model", pattern, rows):
        row = rows[name]
        table.add_row(
            name,
            f"{int(row['parameters']) / 1e6:.1f}",
            f"{int(row['multiply_adds']) / 1e9:.2f}",
            row["top1"] or "-",
            row["weights"].replace(" ", "\n") or "-",
            row["arxiv"],
        )
    Console().print(table)


def configs(
    pattern: Annotated[str, typer.Argument(help="Names to list, such as 'mask_rcnn_*'.")] = "*",
) -> None:
    """List the configs that come with linsight, for linsight train and test."""
    names = sorted(file.stem for file in (find_folders() / "configs").glob("[!_]*/*.py"))
    print("\n".join(_match("config", pattern, names)))


def _match(kind: str, pattern: str, names: Collection[str]) -> list[str]:
    matching = [name for name in names if fnmatch(name, pattern)]
    if not matching:
        near = difflib.get_close_matches(pattern, names) or list(names)[:5]
        print(f"error: no {kind} matches {pattern!r}; there are {', '.join(near)}", file=sys.stderr)
        raise SystemExit(1)
    return matching
