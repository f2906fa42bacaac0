"""docs/zoo.md is what its script writes, and docs/weights.md names what there is."""

import re
from pathlib import Path

import pytest
import timm
import torch

from linsight.backbones import ZOO
from linsight.tools import models, zoo

DOCS = Path(zoo.__file__).parents[1] / "docs"
PAGE = (DOCS / "zoo.md").read_text()


def committed(name):
    """Parameters and multiply-adds that the page has, in its precision."""
    row = re.search(rf"^\| `{name}` \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.MULTILINE)
    assert row, f"docs/zoo.md has no {name}: python -m linsight.tools.zoo > docs/zoo.md"
    return float(row[1]) * 1e6, float(row[2]) * 1e9


def test_the_page_is_what_the_script_writes():
    """All but the counts of each model, which take a minute: see the next test."""
    pytest.importorskip("triton")
    assert zoo.page(committed) == PAGE, "python -m linsight.tools.zoo > docs/zoo.md"


# Of each family the smallest, which is counted in a moment.
@pytest.mark.parametrize("name", [name for name in ZOO if name.endswith("_tiny")])
def test_counts(name):
    parameters, macs = models.count(name)
    assert (round(parameters / 1e6, 1), round(macs / 1e9, 2)) == pytest.approx(
        tuple(x / y for x, y in zip(committed(name), (1e6, 1e9), strict=True))
    )


@pytest.mark.parametrize("name", [name for name in ZOO if not name.endswith("_tiny")])
def test_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e6, 1) == pytest.approx(committed(name)[0] / 1e6)


def test_commands_of_the_page_of_weights_name_models():
    names = re.findall(r"--model ([\w.]+)", (DOCS / "weights.md").read_text())
    assert names
    for name in names:
        architecture, _, tag = name.partition(".")
        assert not tag or tag in ZOO[architecture].weights
        assert any(weights.page for weights in ZOO[architecture].weights.values())


def test_every_family_is_on_the_page_of_weights():
    page = (DOCS / "weights.md").read_text()
    assert not {
        name.rpartition("_")[0] for name in ZOO if f"`{name.rpartition('_')[0]}_*`" not in page
    }
