"""What an installed package needs beyond its modules: every folder, one version."""

import re
from pathlib import Path

import linsight
from linsight.backbones import ZOO

ROOT = Path(__file__).parents[1]
FOLDERS = ("backbones", "configs", "data", "heads", "kernels", "tools")


def test_every_folder_of_modules_and_configs_is_packaged():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)[1]
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert '"linsight_command"' in listed
    wanted = {".".join(("linsight", *file.relative_to(ROOT).parent.parts)) for file in files}
    assert set(re.findall(r'"([\w.]+)"', listed)) >= wanted


def test_one_version_everywhere():
    newest = re.search(r"^## (.+?) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest[1] == linsight.__version__
    assert f'\nversion: {newest[1]}\ndate-released: "{newest[2]}"\n' in citation


def test_every_paper_of_the_zoo_can_be_cited():
    citation = (ROOT / "CITATION.cff").read_text()
    for paper in {model.family.paper for model in ZOO.values()}:
        assert f"https://arxiv.org/abs/{paper.arxiv}" in citation, paper.title
        assert paper.title in citation
