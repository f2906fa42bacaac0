"""The documentation site: it is built without a warning, and its pages begin with a line to run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GUIDE = next(
    [*entry["Guide"]]
    for entry in yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)["nav"]
    if "Guide" in entry
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="needs linsight[docs]")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_is_built_and_whole(site):
    """--strict fails at links, anchors and pages that are missing."""
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.stem for page in site.glob("*.html")}
    text = (site / "zoo.html").read_text()
    assert "<td><code>rala_vit_tiny</code></td>" in text


def test_it_fetches_nothing(site):
    for page in site.glob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", tag), (page.name, tag)


def test_ten_pages_begin_with_the_line_that_does_it():
    pages = [name for entry in GUIDE for name in entry.values()]
    assert len(pages) == 10
    for name in pages:
        lines = (ROOT / "docs" / name).read_text().splitlines()
        (title, *_), fence = lines, next(i for i, line in enumerate(lines) if line[:3] == "```")
        assert title.startswith("# ")
        assert fence <= 7, f"{name}: its first example begins in line {fence + 1}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "your_pictures.ipynb", as_version=4)
    settings = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=300, resources=settings).execute()


def test_the_notebook_is_without_outputs():
    cells = json.loads((ROOT / "docs" / "your_pictures.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 8
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
