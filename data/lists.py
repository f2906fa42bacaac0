"""Lists of files with their labels, as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from timm.data.readers.reader import Reader

from .loading import DataError


def read_pairs(file: str | Path, columns: tuple[str, str]) -> list[tuple[str, str]]:
    """The rows of two columns of a CSV file.

    Raises:
        DataError: there is no such file, or it lacks a column or has no row.
    """
    if not Path(file).is_file():
        raise DataError(f"annotations: there is no file {str(file)!r}")
    with Path(file).open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream)
        if not {*columns} <= {*(table.fieldnames or ())}:
            raise DataError(
                f"annotations {file}: the columns are {', '.join(table.fieldnames or ['none'])}, "
                f"expected {columns[0]} and {columns[1]}"
            )
        rows = [(row[columns[0]], row[columns[1]]) for row in table]
    if not rows:
        raise DataError(f"annotations {file} list no file")
    return rows


class ListReader(Reader):
    """timm's reader of the images that a CSV file lists in the columns file and label.

    Args:
        file: the CSV file.
        root: folder that the names of files start from.
        classes: names of the classes, in the order of their indices.

    Raises:
        DataError: there is no such file, it lacks a column, or has a label that is no class.
    """

    def __init__(self, file: str | Path, root: str | Path, classes: Sequence[str]) -> None:
        super().__init__()
        self.root = str(root)
        self.class_to_idx = {str(name): index for index, name in enumerate(classes)}
        self.samples = []
        for name, label in read_pairs(file, ("file", "label")):
            if label not in self.class_to_idx:
                raise DataError(
                    f"annotations {file}: the label {label!r} of {name} is none of the classes "
                    f"{', '.join(list(self.class_to_idx)[:5])}: name it in dataset.classes"
                )
            self.samples.append((str(Path(root, name)), self.class_to_idx[label]))

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = Path(self.samples[index][0])
        if basename:
            return path.name
        relative = not absolute and path.is_relative_to(self.root)
        return str(path.relative_to(self.root) if relative else path)
