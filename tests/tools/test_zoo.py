"""The pages of the zoo are what their script writes, and docs/weights.md names what there is."""

import re
from pathlib import Path

import pytest
import timm
import torch

from linsight.backbones import ZOO
from linsight.tools import model_cards, models, zoo

DOCS = Path(zoo.__file__).parents[1] / "docs"
COMMAND = "python -m linsight.tools.zoo"


def test_every_model_is_counted():
    assert set(models.read_counts()) == set(ZOO), COMMAND


def test_the_pages_are_what_the_script_writes(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert zoo.page(models.read_counts()) == (DOCS / "zoo.md").read_text(), COMMAND
    assert model_cards.page() == (DOCS / "model_cards.md").read_text(), COMMAND


# Of each family the smallest, which is counted in a moment.
@pytest.mark.parametrize("name", [name for name in ZOO if name.endswith("_tiny")])
def test_counts(name):
    parameters, macs = models.count(name)
    assert (parameters, pytest.approx(macs, rel=1e-3)) == models.read_counts()[name], COMMAND


@pytest.mark.parametrize("name", [name for name in ZOO if not name.endswith("_tiny")])
def test_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == models.read_counts()[name][0], COMMAND


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
