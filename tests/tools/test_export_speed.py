"""A package is timed beside its own program."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from linsight.tools.export_subject import Subject

pytest.importorskip("onnx")
export_speed = pytest.importorskip("linsight.tools.export_speed")

PAGE = """before
<!-- The lines from here are written by `python -m linsight.tools.export_speed`. -->

<!-- The lines up to here are written by `python -m linsight.tools.export_speed`. -->
after
"""
ROW = ("test_vit", "--size", "32", "32", "--batch-size", "2", "--dtype", "float32")
WORDS = (*ROW, "--device", "cpu", "--seconds", "0.01")


def write_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the command writes into a page, by rows and cells."""
    (folder / "docs").mkdir()
    page = folder / "docs" / "export.md"
    page.write_text(PAGE)
    monkeypatch.chdir(folder)
    app = export_speed.typer.Typer()
    app.command()(export_speed.main)
    result = CliRunner().invoke(app, WORDS, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_row_says_what_was_timed(tmp_path, monkeypatch):
    seen: list[Subject] = []
    monkeypatch.setattr(
        export_speed, "rates", lambda subject, *_: seen.append(subject) or [1234.56, 7.0, 8.9]
    )
    head, _, row = write_rows(tmp_path, monkeypatch)
    assert len(row) == len(head)
    assert row[:3] == ["`test_vit`", "2 x 32 x 32", "float32"]
    assert row[4:7] == ["1,234.6", "7.0", "8.9"]
    assert seen[0].size == (32, 32)


def test_a_config_is_a_model_too():
    subject = export_speed.open_untrained("upernet_rala_vit_nano_digits")
    assert subject.task == "segmentation"


@pytest.mark.slow  # C++ is compiled
def test_a_package_is_timed(tmp_path, monkeypatch):
    _, _, row = write_rows(tmp_path, monkeypatch)
    assert all(float(cell.replace(",", "")) > 0 for cell in row[4:7])
