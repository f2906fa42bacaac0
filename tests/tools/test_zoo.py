"""The files generated from the zoo are what its script writes; docs/weights.md names models."""

import json
import re
from pathlib import Path

import pytest
import timm
import yaml

from linsight.backbones import ZOO
from linsight.backbones.initialization import shapes_only
from linsight.tools import models, zoo
from linsight.tools.families import braces, family_name, mixer_name, span

ROOT = Path(zoo.__file__).parents[1]
REFERENCES = ROOT / "tests" / "reference"
COMMAND = "python -m linsight.tools.zoo"


def test_every_model_is_counted():
    assert list(models.read_counts()) == list(ZOO), COMMAND


def test_the_files_are_what_the_script_writes():
    pytest.importorskip("triton")
    files = zoo.generate(ROOT, models.read_counts())
    assert {path.name for path in files} == {
        "CITATION.cff",
        "counts.csv",
        "model_cards.md",
        "models.md",
        "weights.md",
        "zoo.md",
    }
    for path, text in files.items():
        assert path.read_text() == text, f"{path}: {COMMAND}"


def test_hand_written_lines_stay():
    page = f"before\n{zoo.FIRST}old\n{zoo.LAST}after\n"
    assert zoo.replace_lines(page, "new\n") == f"before\n{zoo.FIRST}\nnew\n\n{zoo.LAST}after\n"
    with pytest.raises(ValueError, match="put them back"):
        zoo.replace_lines("before\nold\nafter\n", "new\n")


def test_every_family_is_on_every_page():
    """In the files as they are: a script that leaves one out would agree with itself."""
    zoo_page, cards = ((ROOT / "docs" / page).read_text() for page in ("zoo.md", "model_cards.md"))
    summary, hosts = ((ROOT / page).read_text() for page in ("docs/models.md", "docs/weights.md"))
    for name, row in ZOO.items():
        family = family_name(name)
        skeletons = re.compile(rf"^\| `{mixer_name(family)}(_\S+)?_\*` \|", re.MULTILINE)
        assert f"| `{name}` |" in zoo_page
        assert f"| `{family}_*` |" in zoo_page
        assert f"`{family}_*`" in cards
        assert skeletons.search(summary)
        assert skeletons.search(hosts) or not row.released


def test_weights_that_nobody_released_have_no_address():
    table, hosts = ((ROOT / "docs" / page).read_text() for page in ("zoo.md", "weights.md"))
    assert "/None)" not in table + hosts
    assert "|  |" not in hosts
    bare = {name: set(row.weights) - set(row.released) for name, row in ZOO.items()}
    assert any(bare.values())
    for name, tags in bare.items():
        (line,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert set(re.findall(r"(\w+) \*not released\*", line)) == tags


def test_a_figure_of_another_size_says_so():
    page = (ROOT / "docs" / "zoo.md").read_text()
    others = {name: row for name, row in ZOO.items() if row.top1_size != 224}
    assert others
    for name, row in others.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {row.top1:.1f} ({row.top1_size} px) |" in line


def test_citations_are_data():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    by_url = {reference["url"]: reference for reference in found}
    papers = {row.family.paper for row in ZOO.values()}
    assert len(by_url) == len(found) == len({paper.arxiv for paper in papers})
    for paper in papers:
        reference = by_url[f"https://arxiv.org/abs/{paper.arxiv}"]
        assert (reference["title"], reference["year"]) == (paper.title, paper.year)
        names = [f"{a['family-names']}, {a['given-names']}" for a in reference["authors"]]
        assert tuple(names) == paper.authors
        venue = reference["journal"] if paper.journal else reference["conference"]["name"]
        assert venue == paper.venue


def test_names_and_spans():
    assert braces(["agent_pvt", "agent_swin"]) == "agent_{pvt,swin}"
    assert braces(["soft_norm_vit"]) == "soft_norm_vit"
    assert braces(["van"]) == "van"
    assert mixer_name(family_name("soft_norm_vit_tiny")) == "soft_norm"
    assert mixer_name(family_name("van_b0")) == "van"
    assert family_name("rala_vit_tiny_linear") == "rala_vit"
    assert family_name("softmax_dinov3_small_plus") == "softmax_dinov3"
    assert (span([84.5, 9.0, 74.5]), span([80.0]), span([])) == ("9.0 to 84.5", "80.0", "-")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name.endswith("_tiny")])
def test_counts(name):
    parameters, macs = models.count(name)
    assert (parameters, pytest.approx(macs, rel=1e-3)) == models.read_counts()[name], COMMAND


@pytest.mark.parametrize("name", ZOO)
def test_parameters(name):
    with shapes_only():
        model = timm.create_model(name)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == models.read_counts()[name][0], COMMAND


def test_parameters_are_the_authors():
    """Where the counts are of the authors' image size, which position embeddings grow with."""
    counts = models.read_counts()
    for name, row in ZOO.items():
        if row.parameters and row.top1_size == 224:
            assert counts[name][0] == row.parameters, name
    references = sorted(REFERENCES.glob("*.json"))
    assert references
    for path in references:
        name = re.split(r"[.-]", path.name)[0]
        wanted = json.loads(path.read_text())["parameters"]
        assert (counts[name][0], ZOO[name].parameters) == (wanted, wanted), name


def test_commands_of_the_page_of_weights_name_models():
    names = re.findall(r"--model ([\w.]+)", (ROOT / "docs" / "weights.md").read_text())
    assert names
    for name in names:
        architecture, _, tag = name.partition(".")
        assert not tag or tag in ZOO[architecture].weights
        assert any(weights.page for weights in ZOO[architecture].weights.values())
