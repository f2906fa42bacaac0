"""Compute what the ImageNet recipes cost, and write the table of docs/many_gpus.md.

``python -m linsight.tools.recipe_hours RESULTS.csv...`` takes rows of `linsight benchmark models
NAMES --phases training --modes captured`: the step of `linsight train`, which records the same
graphs. A recipe of which no model was measured at its resolution is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linsight.tools.benchmark_results import read
from linsight.tools.config import CONFIGS, load_config
from linsight.tools.docs_table import write_row

# The pictures of ImageNet-1K's training split, and the GPUs of a node.
PICTURES, GPUS = 1_281_167, 8
HEAD = (
    *("recipe", "pixels", "epochs", "images/s per GPU", "hours of eight GPUs", "device", "batch"),
    *("torch", "date"),
)


def hours(epochs: int, rate: float) -> float:
    """The hours of a node that trains for `epochs`, at `rate` images per second and GPU."""
    return epochs * PICTURES / (GPUS * rate * 3600)


def measured(files: list[Path]) -> dict[tuple[str, int], dict[str, Any]]:
    """The last row of each model and resolution that trains from the library's graphs."""
    rows = [row for file in files for row in read(file)]
    return {
        (row["name"], int(row["resolution"])): row
        for row in rows
        if (row["kind"], row["mode"], row["phase"]) == ("models", "captured", "training")
        and row["images_per_second"]
        and not row["peer_of"].startswith("reference")
    }


def main(
    results: Annotated[list[Path], typer.Argument(help="CSVs of linsight benchmark.")],
) -> None:
    """Write the table in docs/many_gpus.md of the checkout in the current folder."""
    found = measured(results)
    for file in sorted(CONFIGS.glob("[!_]*/*_in1k.py")):
        config = load_config(file)
        model = config.model.get("backbone", {}).get("model_name", "")
        pixels = config.train_dataloader.dataset.transform.input_size
        row = found.get((model, pixels))
        if row is None:
            continue
        epochs, rate = config.train_cfg.max_epochs, float(row["images_per_second"])
        cells = [f"`{file.stem}`", str(pixels), str(epochs), f"{rate:,.0f}"]
        cells += [f"{hours(epochs, rate):.1f}", row["device"], row["batch"]]
        cells += [row["torch"], row["date"][:10]]
        write_row(cells, "recipe_hours", HEAD, 1, lambda cells: cells[0], page="many_gpus.md")
        print(*cells, sep="  ")


if __name__ == "__main__":
    typer.run(main)
