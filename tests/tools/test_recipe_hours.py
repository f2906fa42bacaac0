"""What the ImageNet recipes cost, from the rows of a benchmark."""

import pytest
from typer import Typer
from typer.testing import CliRunner

from linsight.tools import recipe_hours
from linsight.tools.benchmark_results import Results, Row

PAGE = """before
<!-- The lines from here are written by `python -m linsight.tools.recipe_hours`. -->

<!-- The lines up to here are written by `python -m linsight.tools.recipe_hours`. -->
after
"""


def row(name: str, rate: float, mode: str = "captured", resolution: int = 224, peer_of: str = ""):
    shape = f"128 x {resolution}²"
    options = {"images_per_second": rate, "device": "a GPU", "torch": "2.11.0"}
    where = {"dtype": "bfloat16", "resolution": resolution, "shape": shape, "batch": 128}
    return Row("models", name, peer_of, mode, "training", **where, **options)


def test_the_hours_of_a_recipe():
    assert recipe_hours.hours(300, 2700) == pytest.approx(4.943, abs=1e-3)


def test_recipes_whose_models_were_measured(tmp_path, monkeypatch):
    results = Results(tmp_path / "results.csv")
    results.add(row("rala_vit_small", 2700.0))
    results.add(row("rala_vit_small", 9999.0, mode="eager"))
    results.add(row("rala_vit_small", 800.0, peer_of="reference rala_vit_small"))
    results.add(row("van_b1", 3000.0, resolution=512))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "many_gpus.md"
    page.write_text(PAGE)
    monkeypatch.chdir(tmp_path)
    app = Typer()
    app.command()(recipe_hours.main)
    run = CliRunner().invoke(app, ["results.csv"], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [cell[:7] for cell in cells] == [
        ["`rala_vit_small_300e_in1k`", "224", "300", "2,700", "4.9", "a GPU", "128"]
    ]
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
