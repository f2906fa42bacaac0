"""Tables in the pages of docs/, whose rows the tools write one at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write_row(
    row: list[str],
    tool: str,
    head: Sequence[str],
    keys: int,
    place: Callable[[list[str]], Any],
    page: str = "export.md",
) -> None:
    """Put a row into a table of a page in docs/, in the place of one that begins alike.

    Args:
        row: its cells.
        tool: the module that writes the table, which comments around the table name.
        head: the titles of the columns.
        keys: how many cells at the beginning tell rows apart.
        place: the sort key of a row.
        page: the file in docs/.
    """
    begin, end = (
        f"<!-- The lines {where} here are written by `python -m linsight.tools.{tool}`. -->"
        for where in ("from", "up to")
    )
    path = Path("docs", page)
    before, _, rest = path.read_text().partition(begin)
    table, _, after = rest.partition(end)
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [other + [""] * (len(head) - len(other)) for other in rows if other[:keys] != row[:keys]]
    rows = sorted([*rows, row], key=place)
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    path.write_text(before + "\n".join((begin, "", *lines, "", end)) + after)
