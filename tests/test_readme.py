"""Every example of the README and of CONTRIBUTING, in their order, run as written.

Training is cut short, to one epoch of two blocks on a few scenes, and a graph is traced for one
size. And docs/reliability.md names tests that there are, and the figures of speed are those of the
benchmark's CSVs.
"""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from linsight.backbones.mixers import base

ROOT = Path(__file__).parents[1]
SHORT = ["train_cfg.max_epochs=1", "train_dataloader.dataset.length=2000"]
SHORT += ["train_dataloader.num_workers=0", "val_dataloader.num_workers=0"]
SHORT += ["test_dataloader.num_workers=0", "model.backbone.depths=(1,0,0,1)"]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader stands: a folder with some pictures."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "pictures").mkdir()
    Image.new("RGB", (80, 60), "teal").save(folder / "pictures" / "teal.png")
    for name in ("red", "green"):
        (folder / "photos" / name).mkdir(parents=True)
        for side in range(40, 46):
            Image.new("RGB", (side, 40), name).save(folder / "photos" / name / f"{side}.png")
    return folder


@pytest.fixture(autouse=True)
def own_mixers(monkeypatch):
    """A mixer that an example registers is gone after its test."""
    monkeypatch.setattr(base, "MIXERS", dict(base.MIXERS))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_python(document, folder, monkeypatch):
    monkeypatch.chdir(folder)
    examples = blocks(document, "python")
    assert examples
    for example in examples:
        exec(compile(example, document, "exec"), {"__name__": "__main__"})


SWIN = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}


@pytest.mark.parametrize(("name", "size"), [("rala_vit_nano", {}), ("softmax_swin_tiny", SWIN)])
def test_the_new_mixer_trains_in_a_model(name, size):
    """CONTRIBUTING's example, taken to where it says that it leads."""
    import timm
    import torch

    scope = {"__name__": "example"}
    exec(blocks("CONTRIBUTING.md", "python")[0], scope)
    model = timm.create_model(name, mixer="exponential", num_classes=3, **size)
    assert any(isinstance(module, scope["Exponential"]) for module in model.modules())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    logits = model(torch.randn(2, 3, 64, 32))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


COMMANDS = [
    line
    for block in blocks("README.md", "console")
    for line in block.splitlines()
    if line.startswith("linsight ")
]


def test_readme_has_an_example_of_every_command():
    named = {line.split()[1] for line in COMMANDS}
    assert named == {
        "check",
        "configs",
        "train",
        "test",
        "predict",
        "export",
        "convert",
        "models",
        "info",
        "benchmark",
    }


# One after the other: what a command writes, the next reads.
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, folder):
    words = shlex.split(command)[1:]
    for index, word in enumerate(words):
        if "*." in word:  # a shell puts the file's name there
            (words[index],) = map(str, folder.glob(word))
    if "--data" in words:  # the last of an option's values counts
        words += ["--model", "rala_vit_nano", "--weights", "none", "--image-size", "32"]
        words += ["--epochs", "1", "--workers", "0"]
    elif "--to" in words:
        words += ["--size", "64x64"]
    elif words[0] in ("train", "test"):
        words += ["--cfg-options", *SHORT]
    done = subprocess.run(
        [sys.executable, "-m", "linsight.tools.main", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_that_reliability_names():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"\]\(\.\./(tests/[^)]+\.py)\)((?:(?:, )?`::[\w:]+`)*)", text)
    assert len(named) > 30
    for file, names in named:
        content = (ROOT / file).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^ *(?:def|class) {name}\b", content, re.MULTILINE), (file, name)


def test_figures_of_speed_are_measured():
    measured = set()
    for file in (ROOT / "docs" / "assets").glob("benchmark_h100*.csv"):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name, scale, suffix in (
                    ("images_per_second", 1, ""),
                    ("peak_mib", 1, ""),
                    ("p50_ms", 1e3, ""),
                    ("floor_us", 1, ""),
                    ("fraction", 100, " %"),
                ):
                    if row[name]:
                        value = scale * float(row[name])
                        measured |= {f"{value:,.{digits}f}{suffix}" for digits in (0, 1)}
    text = (ROOT / "docs" / "performance.md").read_text()
    tables = text[text.index("**Operators**") : text.index("**The host decides.**")]
    cells = [c.strip() for line in tables.splitlines() if line[:1] == "|" for c in line.split("|")]
    said = {c.removesuffix(" µs") for c in cells if re.fullmatch(r"[\d,.]+( µs| %)?", c)}
    text = (ROOT / "README.md").read_text()
    paragraph = text[text.index("On one H100") : text.index("![Models against resolution]")]
    said |= set(re.findall(r"\b\d+,\d{3}\b", paragraph))
    assert len(said) > 100
    assert not said - measured, "not in docs/assets: " + ", ".join(sorted(said - measured))
