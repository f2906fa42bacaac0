"""Every example of the README and of the pages in docs/, in their order, run as written.

Training is cut short, to one epoch of two blocks on a few scenes, and a graph is traced for one
size. Of commands that need what is not here the words are read by the command itself. And
docs/reliability.md names tests that there are, and the figures of speed are those of the
benchmark's CSVs.
"""

import csv
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from linsight.backbones.mixers import base
from linsight_command import app

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
CONFIGS = {file.stem for file in (ROOT / "configs").glob("[!_]*/*.py")}
SMALL = "model.backbone.depths=(1,0,0,1)"
SHORT = ["train_cfg.max_epochs=1", "train_dataloader.dataset.length=1000"]
SHORT += ["train_dataloader.num_workers=0", "val_dataloader.num_workers=0"]
SHORT += ["test_dataloader.num_workers=0", SMALL]
SHORT += ["val_dataloader.dataset.length=64", "test_dataloader.dataset.length=64"]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(document: str) -> list[str]:
    lines = "".join(blocks(document, "console")).replace("\\\n", "").splitlines()
    if document == "docs/index.md":  # where each line stands beside its page
        lines += re.findall(r"`(linsight .*?)`", (ROOT / document).read_text())
    return [line for line in lines if line.startswith("linsight ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader stands: a folder with some pictures, and weights of a paper's authors."""
    folder = tmp_path_factory.mktemp("reader")
    torch.save(timm.create_model("rala_vit_nano").state_dict(), folder / "weights.pth")
    (folder / "pictures").mkdir()
    Image.new("RGB", (80, 60), "teal").save(folder / "pictures" / "cat.jpg")
    for name in ("red", "green"):
        (folder / "photos" / name).mkdir(parents=True)
        for side in range(40, 46):
            Image.new("RGB", (side, 40), name).save(folder / "photos" / name / f"{side}.png")
    return folder


@pytest.fixture(autouse=True)
def own_mixers(monkeypatch):
    """A mixer that an example registers is gone after its test."""
    monkeypatch.setattr(base, "MIXERS", dict(base.MIXERS))


# What an example needs that is not here, by a word of it; other tests run the first four.
NEEDS = {
    "AutoModelForImageClassification": "an exported folder: tests/tools/test_transformers.py",
    "executorch": "an exported file: tests/tools/test_export_runtimes.py",
    "coremltools": "an exported file: tests/tools/test_export_runtimes.py",
    'load("best.pth")': "a training: test_the_trained_model_in_python",
    ".ms_in22k_ft_in1k": "the network",
    "agent_swin_tiny.safetensors": "the authors' weights",
}
EXAMPLES = [(page, index) for page in PAGES for index in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "index"), EXAMPLES)
def test_python(page, index, folder, monkeypatch):
    monkeypatch.chdir(folder)
    example = blocks(page, "python")[index].replace("CHECKOUT", str(ROOT))
    code = compile(example, page, "exec")
    if not any(word in example for word in NEEDS):
        exec(code, {"__name__": "__main__"})


def test_what_is_not_run_is_there():
    every = "".join(blocks(page, "python")[index] for page, index in EXAMPLES)
    assert all(every.count(word) for word in NEEDS)


SWIN = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}


@pytest.mark.parametrize(("name", "size"), [("rala_vit_nano", {}), ("softmax_swin_tiny", SWIN)])
def test_the_new_mixer_trains_in_a_model(name, size):
    """The first example of docs/new_mixer.md, taken to where it says that it leads."""
    scope = {"__name__": "example"}
    exec(blocks("docs/new_mixer.md", "python")[0], scope)
    model = timm.create_model(name, mixer="exponential", num_classes=3, **size)
    assert any(isinstance(module, scope["Exponential"]) for module in model.modules())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    logits = model(torch.randn(2, 3, 64, 32))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


WALK = [
    line
    for line in dict.fromkeys(commands("README.md") + commands("docs/models.md"))
    if "data_root=" not in line
]


def test_there_is_an_example_of_every_command():
    named = {line.split()[1] for line in WALK}
    assert named == {
        "check",
        "configs",
        "train",
        "test",
        "predict",
        "look",
        "export",
        "convert",
        "models",
        "info",
        "benchmark",
    }


# One after the other: what a command writes, the next reads.
@pytest.mark.parametrize("command", WALK)
def test_commands(command, folder, monkeypatch):
    words = shlex.split(command)[1:]
    for index, word in enumerate(words):
        if "*." in word:  # a shell puts the file's name there
            (words[index],) = map(str, folder.glob(word))
    if words[:2] == ["benchmark", "mixers"]:
        words[words.index("224")] = "32"
        words += ["--batch", "1", "--seconds", "0.001"]
    if "--data" in words:  # the last of an option's values counts
        words += ["--model", "rala_vit_nano", "--weights", "none", "--image-size", "32"]
        words += ["--epochs", "1", "--workers", "0"]
        words += ["--work-dir", "work_dirs/photos_rala_vit_tiny", "--cfg-options", SMALL]
    elif "--to" in words:
        words += ["--size", "64x64"]
    elif "rala_vit_nano_digits" in words:
        words += ["--cfg-options", *SHORT]
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"


def test_the_trained_model_in_python(folder, monkeypatch, capsys):
    """The example of docs/your_own_data.md, with what README's training left."""
    monkeypatch.chdir(folder)
    (best,) = folder.glob("work_dirs/photos_rala_vit_tiny/best_*.pth")
    shutil.copy(best, "best.pth")
    Image.new("RGB", (80, 60), "red").save("picture.jpg")
    exec(blocks("docs/your_own_data.md", "python")[0], {})
    assert "['green', 'red']" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_the_words_of_commands(page):
    """Each command, option and type is there, and so are the configs and models that they name."""
    group = typer.main.get_command(app)
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        if "--help" in words or "--version" in words:
            continue
        context = group.make_context("linsight", words[:1])
        name, command, rest = group.resolve_command(context, words)
        options = command.make_context(name, rest).params
        config, model = options.get("config"), options.get("model")
        if config and "/" not in config and "=" not in config and config.islower():
            assert config in CONFIGS, line
        if model and name in ("train", "info", "warm", "linearise", "convert"):
            assert timm.is_model(model) or model.endswith((".pth", ".safetensors")), line


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
