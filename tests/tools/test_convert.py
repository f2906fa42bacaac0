"""`linsight convert` on files as authors release them, and on files that it must refuse."""

import errno
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from typer.testing import CliRunner

from linsight.tools import main
from linsight.tools.model import open_model

from ..backbones.conftest import lively
from ..reference import fill

REFERENCES = Path(fill.__file__).parent


@pytest.fixture(scope="module")
def app():
    return main.app


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of a training, of which the averaged weights count."""
    model = lively(timm.create_model("rala_vit_nano"))
    other = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": other, "state_dict_ema": model.state_dict(), "epoch": 299}, path)
    return path


def run(app, *words):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


@pytest.mark.parametrize("name", ["agent_deit_tiny", "soft_vit_tiny.in1k_2021"])
def test_authors_names(app, tmp_path, name):
    """The converted file builds the model that the authors' own file builds."""
    reference = name.replace("2021", "2021-dense")
    manifest = json.loads((REFERENCES / f"{reference}.json").read_text())
    state = {key: torch.from_numpy(value) for key, value in fill.state_dict(manifest).items()}
    state |= {key: torch.tensor(0) for key in manifest["not_filled"]}
    theirs = tmp_path / "theirs.pth"
    torch.save({"model": state, "epoch": 299}, theirs)
    result = run(app, theirs, "--model", name)
    assert result.exit_code == 0, result.output
    ours = tmp_path / f"{name}.safetensors"
    assert f"Read {theirs}" in result.output
    assert f"Wrote {ours}" in result.output
    wanted = open_model(theirs, name)
    scope = {"timm": timm}
    loaded = eval(result.output.split("Load it with ")[1].strip(), scope).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(loaded(x), wanted(x))


def test_averaged_weights_and_another_name(app, weights, tmp_path):
    out = tmp_path / "new" / "nano.safetensors"
    result = run(app, weights, "--model", "rala_vit_nano", "--out", out)
    assert result.exit_code == 0, result.output
    averaged = torch.load(weights, weights_only=True)["state_dict_ema"]
    written = safetensors.torch.load_file(out)
    assert written.keys() == averaged.keys()
    assert all(torch.equal(written[name], averaged[name]) for name in averaged)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "rala_vit_tiny"], "the checkpoint is not of rala_vit_tiny: "),
        (["--model", "softmax_deit_tiny"], "not of softmax_deit_tiny"),
        (["--model", "rala_vit_nanno"], "nearest are rala_vit_nano"),
        (["--model", "rala_vit_nano", "--out", "w.pth"], "ends in .safetensors"),
    ],
)
def test_refusals(app, weights, words, message):
    result = run(app, weights, *words)
    assert result.exit_code == 1
    assert message in result.output
    assert [path.name for path in weights.parent.iterdir()] == ["weights.pth"]


def test_no_such_file(app, tmp_path):
    result = run(app, tmp_path / "none.pth", "--model", "rala_vit_nano")
    assert result.exit_code == 1
    assert "none.pth does not exist" in result.output


def test_truncated(app, weights):
    weights.write_bytes(weights.read_bytes()[:100_000])
    result = run(app, weights, "--model", "rala_vit_nano")
    assert result.exit_code == 1
    assert "truncated or damaged (100000 bytes)" in result.output


def test_code_is_not_run(app, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"model": {"w": torch.ones(1)}, "config": Trap()}, tmp_path / "w.pth")
    result = run(app, tmp_path / "w.pth", "--model", "rala_vit_nano")
    assert result.exit_code == 1
    assert "wants to run code" in result.output
    assert not (tmp_path / "sprung").exists()


def test_a_training_checkpoint_of_another_model(app, tmp_path):
    from linsight.tools.config import load_config

    model = timm.create_model("rala_vit_nano", num_classes=10)
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    meta = {"cfg": load_config("rala_vit_nano_digits").pretty_text, "dataset_meta": {}}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "epoch_5.pth")
    result = run(app, tmp_path / "epoch_5.pth", "--model", "mala_vit_nano")
    assert result.exit_code == 1
    assert "is of rala_vit_nano, not of mala_vit_nano" in result.output


def test_a_full_disk_leaves_what_was_there(app, weights, tmp_path, monkeypatch):
    out = tmp_path / "rala_vit_nano.safetensors"
    out.write_bytes(b"before")

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = run(app, weights, "--model", "rala_vit_nano")
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert out.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "weights.pth"]


def test_never_onto_itself(app, weights, tmp_path):
    run(app, weights, "--model", "rala_vit_nano")
    ours = tmp_path / "rala_vit_nano.safetensors"
    before = ours.read_bytes()
    result = run(app, ours, "--model", "rala_vit_nano")
    assert result.exit_code == 1
    assert "is the file to convert itself" in result.output
    assert ours.read_bytes() == before
