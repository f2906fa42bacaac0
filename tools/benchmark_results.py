"""The rows of `linsight benchmark`: columns, CSV file and table."""

from __future__ import annotations

import csv
import errno
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import typer
from rich.console import Console, JustifyMethod
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measurement, which is a line of the CSV; values that were not measured are empty.

    Attributes:
        mode: 'eager' (plain calls), 'captured' (by linsight's own CUDA graphs), 'graph' (the
            whole call replayed from a CUDA graph), 'compile' (torch.compile, plain calls),
            'compile graph', 'reduce-overhead' (torch.compile with its CUDA graphs), or the runtime
            of an exported file: 'onnxruntime', 'openvino' or 'aoti' (a package of AOTInductor).
        phase: 'inference', 'latency' and 'training' of models, 'multi-scale' of detectors;
            'forward', 'forward+backward' and their difference 'backward' of operators.
        peak_mib: largest memory that tensors took, in MiB.
        floor_us: the bytes that must be moved, divided by the bandwidth of a copy.
        fraction: the floor divided by the median time.
        first_call_s: time of the first call at this resolution, compilation included.
        compiled: Triton's machine codes that were compiled: in a cold start by the first call, in
            training at changing sizes after the first iterations.
        check: 'ok', or why there are no times.
    """

    kind: str
    name: str
    peer_of: str
    mode: str
    phase: str
    dtype: str
    resolution: int
    shape: str
    batch: int
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    images_per_second: float | None = None
    peak_mib: float | None = None
    floor_us: float | None = None
    fraction: float | None = None
    first_call_s: float | None = None
    compiled: int | None = None
    check: str = "ok"
    device: str = ""
    torch: str = ""
    triton: str = ""
    timm: str = ""
    linsight: str = ""
    date: str = ""


class Results:
    """A CSV file that is complete at every moment, as it is written anew and then renamed.

    Rows that the file already has are kept.

    Raises:
        typer.BadParameter: the folder cannot be written, or the file has columns that are not
            known here, which would be lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path) if path.exists() else []
        known = {field.name for field in fields(Row)}
        if unknown := {str(name) for row in self.rows for name in row} - known:
            raise typer.BadParameter(
                f"{path} is of another version of linsight, with the columns "
                f"{', '.join(sorted(unknown))}: give another folder by --out"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise typer.BadParameter(f"--out {path.parent}: {error.strerror}") from None

    def add(self, row: Row) -> None:
        self.rows.append(
            {
                field: ""
                if value is None
                else f"{value:.6g}"
                if isinstance(value, float)
                else value
                for field, value in asdict(row).items()
            }
        )
        beside = self.path.with_suffix(".csv.new")
        with open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(beside, self.path)


# Columns that files of earlier versions lack.
LATER = ("compiled",)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV of `linsight benchmark`.

    Raises:
        typer.BadParameter: there is no such file, or it lacks columns.
    """
    if not path.exists():
        raise typer.BadParameter(f"{path} does not exist")
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        if missing := {field.name for field in fields(Row)} - {*(rows.fieldnames or ()), *LATER}:
            raise typer.BadParameter(f"{path} lacks the columns {', '.join(sorted(missing))}")
        return [dict.fromkeys(LATER, "") | row for row in rows]


WIDTH = 142
COLUMNS: tuple[tuple[str, int, JustifyMethod, Callable[[Row], str]], ...] = (
    # Heading, width, alignment, and the function from a row to its text.
    ("name", 30, "left", lambda r: ("  " if r.peer_of else "") + r.name),
    ("of", 22, "left", lambda r: r.shape),
    ("mode", 15, "left", lambda r: r.mode),
    ("phase", 16, "left", lambda r: r.phase),
    ("median ms", 9, "right", lambda r: _number(r.p50_ms)),
    ("images/s", 8, "right", lambda r: _number(r.images_per_second)),
    ("MiB", 7, "right", lambda r: _number(r.peak_mib)),
    ("floor", 5, "right", lambda r: "" if r.fraction is None else f"{r.fraction:.0%}"),
    ("first s", 8, "right", lambda r: _number(r.first_call_s)),
    ("codes", 5, "right", lambda r: "" if r.compiled is None else str(r.compiled)),
)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def print_row(console: Console, row: Row | None) -> None:
    """Print one line of the table of results, or its head if `row` is None."""
    table = Table(box=None, show_header=row is None, padding=(0, 1, 0, 0))
    for heading, width, justify, _ in COLUMNS:
        table.add_column(heading, width=width, justify=justify, no_wrap=justify == "right")
    if row is not None:
        table.add_row(*(text(row) for *_, text in COLUMNS))
    console.print(table)
    if row is not None and row.check != "ok":
        console.print(f"  {row.check}", style="yellow" if row.p50_ms else "red", markup=False)
