"""predict, export, models and info, as a user calls them."""

import json
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import DATASETS
from PIL import Image
from safetensors.torch import save
from timm.models import save_for_hf
from typer.testing import CliRunner

import linsight_command
from linsight.backbones.checkpoint import CheckpointError
from linsight.data.loading import DataError
from linsight.data.pictures import read_picture
from linsight.kernels.runtime import dispatch
from linsight.tools import main, models, predict
from linsight.tools.config import load_config
from linsight.tools.export import Format, write_file
from linsight.tools.export_file import open_file
from linsight.tools.export_subject import classifier_subject
from linsight.tools.model import class_names, open_model, read_run
from linsight.tools.predict_classification import ClassificationPredictor

from ..backbones.conftest import lively
from .conftest import full_disk


@pytest.fixture(scope="module")
def app():
    return main.app


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A training checkpoint of the demonstration's model, which has not been trained."""
    model = lively(timm.create_model("rala_vit_nano", num_classes=10))
    meta = {
        "cfg": load_config("rala_vit_nano_digits").pretty_text,
        "dataset_meta": {"classes": [f"digit {i}" for i in range(10)]},
    }
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "epoch_5.pth"
    torch.save({"meta": meta, "state_dict": state}, path)
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("wide.png", (70, 130)), ("grey.jpg", (64, 64)), ("tiny.png", (8, 9))):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        (image.convert("L") if name == "grey.jpg" else image).save(folder / name)
    return folder


def run(app, *words):
    return CliRunner().invoke(app, list(map(str, words)))


def test_open_a_training_checkpoint(checkpoint):
    model = open_model(checkpoint)
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert class_names(model)[3] == "digit 3"
    wanted = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(model.head.fc.weight, wanted["backbone.head.fc.weight"])


def test_predict(app, checkpoint, pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"no picture")
    words = ["--out", tmp_path / "out", "--topk", 2, "--device", "cpu"]
    result = run(app, "predict", checkpoint, pictures, *words)
    assert result.exit_code == 0, result.output
    assert "1 of 4 pictures could not be read" in result.output
    drawings = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert drawings == ["grey.png", "tiny.png", "wide.png"]
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2
    assert lines[0] == "picture,class,probability"

    model = open_model(checkpoint)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        scores = model(transform(Image.open(pictures / "wide.png"))[None])[0].softmax(-1)
    name, share = next(line for line in lines if "wide" in line).split(",")[1:]
    assert name == f"digit {scores.argmax()}"
    assert float(share) == pytest.approx(scores.max().item(), abs=1e-4)


def test_predictions_on_a_full_disk(app, checkpoint, pictures, tmp_path):
    (tmp_path / "predictions.csv").write_text("before")
    words = ["--out", tmp_path, "--device", "cpu"]  # A GPU's kernels are files, too.
    with full_disk(1000):
        result = run(app, "predict", checkpoint, pictures / "tiny.png", *words)
    assert result.exit_code == 1
    assert f"cannot write {tmp_path / 'tiny.png'}: File too large" in result.output
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["predictions.csv"]
    assert (tmp_path / "predictions.csv").read_text() == "before"


def test_odd_pictures(app, checkpoint, tmp_path):
    """Pictures of extreme shapes, of every depth, and such as promise more than they hold."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    depths = {"i16": "I;16", "palette": "P", "bits": "1", "alpha": "RGBA"}
    for name, mode in depths.items():
        Image.new(mode, (40, 30)).save(folder / f"{name}.png")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (1, 2000)).save(folder / "line.png")
    Image.new("CMYK", (40, 30)).save(folder / "ink.jpg")
    whole = (folder / "ink.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    png = (folder / "pixel.png").read_bytes()
    for name, sides in (("none", (0, 9)), ("bomb", (60_000, 60_000))):
        header = b"IHDR" + struct.pack(">II", *sides) + png[24:29]
        (folder / f"{name}.png").write_bytes(
            png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
        )
    result = run(app, "predict", checkpoint, folder, "--out", tmp_path / "out", "--topk", 1)
    assert result.exit_code == 0, result.output
    assert "3 of 10 pictures could not be read" in result.output
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1:]
    assert len(lines) == 7
    assert all(0 < float(line.rpartition(",")[2]) <= 1 for line in lines)


def test_prediction_and_testing_see_the_same_pixels(checkpoint, pictures, tmp_path):
    """Also where the config names no interpolation, and the model's own would be another."""
    (tmp_path / "images" / "only").mkdir(parents=True)
    shutil.copy(pictures / "wide.png", tmp_path / "images" / "only")
    dataset = read_run(checkpoint).config.test_dataloader.dataset
    assert "interpolation" not in dataset.transform
    model = open_model(checkpoint)
    assert (
        model.default_cfg["interpolation"]
        == "bilinear"
        != (timm.create_model("rala_vit_nano").default_cfg["interpolation"])
    )
    settings = {"type": "TimmDataset", "transform": dataset.transform}
    tested = DATASETS.build({**settings, "root": str(tmp_path / "images")})[0][0]
    predictor = ClassificationPredictor(model, torch.device("cpu"), 1)
    assert torch.equal(predictor.transform(read_picture(pictures / "wide.png")), tested)


def test_a_transform_may_say_what_concerns_training(checkpoint, tmp_path):
    """As timm's function does. What prediction cannot repeat is refused."""

    def open_with(words):
        content = torch.load(checkpoint, weights_only=True)
        cfg = content["meta"]["cfg"]
        content["meta"]["cfg"] = cfg.replace("transform=dict(", f"transform=dict({words}, ")
        assert content["meta"]["cfg"] != cfg
        torch.save(content, tmp_path / "w.pth")
        return open_model(tmp_path / "w.pth")

    assert open_with("is_training=False, hflip=0.5, crop_border_pixels=0")
    with pytest.raises(CheckpointError, match=r"transform\.crop_border_pixels=4, which predict"):
        open_with("crop_border_pixels=4")


@pytest.mark.parametrize(
    "names",
    [
        ("a/caf\u00e9.jpg", "b/cafe\u0301.jpg"),
        ("a/caf\u00e9.jpg", "a/cafe\u0301.jpg"),
        ("a/IMG.jpg", "b/img.jpg"),
        ("a/IMG.jpg", "a/img.JPG"),
        ("a/IMG.mp4", "a/img.mp4"),
        ("/a/x.jpg", "a/x.jpg"),
        ("../x.jpg", "x.jpg", ".x.jpg"),
    ],
    ids=str,
)
def test_drawings_that_a_file_system_takes_for_one(names):
    drawings = predict._drawings(Path("out"), [Path(name) for name in names])
    folded = {unicodedata.normalize("NFC", drawing.name).casefold() for drawing in drawings}
    assert len(folded) == len(names)
    assert not any(name.startswith(".") for name in folded)


def test_each_drawing_has_a_name_of_its_own(tmp_path):
    names = ["a/img.jpg", "a/img.png", "a/x.jpg", "b/x.jpg", "c/d/x.jpg", "e/d/x.jpg", "y.jpg"]
    files = [tmp_path / name for name in names]
    drawings = predict._drawings(tmp_path / "out", files)
    assert [drawing.name for drawing in drawings] == [
        "img.jpg.png",
        "img.png.png",
        "a_x.png",
        "b_x.png",
        "c_d_x.png",
        "e_d_x.png",
        "y.png",
    ]
    alike = [Path("a_b/x.jpg"), Path("a/b_x.jpg"), Path("x.jpg"), Path("a/b/x.jpg"), Path("/x.jpg")]
    assert len(set(predict._drawings(Path("out"), alike))) == 5
    clip = predict._drawings(Path("out"), [Path("a/clip.mp4"), Path("a/clip.mp4.png")])
    assert len(set(clip)) == 2
    with pytest.raises(DataError, match=r"a/y\.png would overwrite a picture: give another --out"):
        predict._drawings(Path("a"), [Path("a/y.png")])


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "'gpu', expected such as cpu"), ("cuda:99", "and torch finds")]
)
def test_no_such_device(app, checkpoint, pictures, device, message):
    result = run(app, "predict", checkpoint, pictures, "--device", device)
    assert result.exit_code == 1
    assert message in result.output


def test_predict_without_a_readable_picture(app, checkpoint, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    result = run(app, "predict", checkpoint, tmp_path / "broken.png", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "no picture could be read" in result.output


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rala_vit_tinny", "nearest models are rala_vit_tiny"),
        ("no/such/file.pth", "neither a file nor a model"),
    ],
)
def test_an_unknown_model(app, pictures, source, message):
    result = run(app, "predict", source, pictures)
    assert result.exit_code == 1
    assert message in result.output


def test_export_round_trip(app, checkpoint, tmp_path):
    folder = tmp_path / "digits"
    result = run(app, "export", checkpoint, "--out", folder)
    assert result.exit_code == 0, result.output
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "rala_vit_nano"
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["label_names"][7] == "digit 7"
    original = open_model(checkpoint)
    overlay = {"file": str(folder / "model.safetensors"), "num_classes": 10}
    x = torch.randn(2, 3, 64, 64)
    for loaded in (
        open_model(folder),
        open_model(folder / "model.safetensors"),
        timm.create_model(
            "rala_vit_nano", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay
        ).eval(),
    ):
        assert torch.equal(loaded(x), original(x))
    assert class_names(open_model(folder))[7] == "digit 7"


SWIN = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)}


@pytest.mark.parametrize(
    ("name", "options", "tied"),
    [
        pytest.param("softmax_swin_tiny", SWIN, (224, 224), marks=pytest.mark.slow),
        ("softmax_deit_tiny", {"depth": 1}, None),
    ],
)
def test_windows_tie_a_graph_to_its_size(name, options, tied, tmp_path):
    model = timm.create_model(name, num_classes=5, **options).eval()
    subject = classifier_subject(model)
    written = write_file(subject, tmp_path, Format.torch)
    assert written.size == tied
    height, width = tied or (96, 160)
    images = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    mean, std = (torch.tensor(subject.description[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        found = open_file(written.path).run(images)["logits"]
        wanted = model((images / 255 - mean) / std)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_export_to_a_full_disk_leaves_what_was_there(app, checkpoint, tmp_path):
    run(app, "export", checkpoint, "--out", tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with full_disk(100_000):
        result = run(app, "export", checkpoint, "--out", tmp_path)
    assert result.exit_code == 1
    assert f"error: cannot write to {tmp_path}" in result.output
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def exported(app, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    run(app, "export", checkpoint, "--out", folder)
    return folder


CONFIG, WEIGHTS = "config.json", "model.safetensors"
DAMAGES = {
    "empty": (CONFIG, lambda text: b""),
    "truncated": (CONFIG, lambda text: text[:100]),
    "list": (CONFIG, lambda text: b"[]"),
    "nothing": (CONFIG, lambda text: b"{}"),
    "unheard_model": (CONFIG, lambda text: text.replace(b"vit_nano", b"vit_unheard")),
    "larger_model": (CONFIG, lambda text: text.replace(b"vit_nano", b"vit_tiny")),
    "other_model": (CONFIG, lambda text: text.replace(b"rala_vit_nano", b"resnet10t")),
    "other_classes": (CONFIG, lambda text: text.replace(b'classes": 10', b'classes": 7')),
    "classes_in_words": (CONFIG, lambda text: text.replace(b'classes": 10', b'classes": "ten"')),
    "no_weights": (WEIGHTS, lambda data: b""),
    "half_the_weights": (WEIGHTS, lambda data: data[: len(data) // 2]),
    "endless_header": (WEIGHTS, lambda data: (1 << 60).to_bytes(8, "little") + data[8:]),
    "other_weights": (WEIGHTS, lambda data: save({"w": torch.zeros(2)})),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_export(app, exported, pictures, tmp_path, name, damage):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    result = run(app, "predict", folder, pictures, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert str(folder) in result.output or "is not of rala_vit" in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": "model = 3"}, "its config lacks a model"),
        ({"cfg": "print(1)"}, "line 1 assigns no value to a name"),
        ({"cfg": "model = ("}, "is not plain data"),
        ({"vit_nano": "vit_nan"}, "timm has no model 'rala_vit_nan'"),
        ({"vit_nano": "vit_tiny"}, "does not fit the model that it names"),
        ({"dataset_meta": {"classes": ["one"]}}, "names 1 classes, and its config has"),
    ],
)
def test_a_checkpoint_whose_config_is_damaged(app, checkpoint, pictures, tmp_path, change, message):
    content = torch.load(checkpoint, weights_only=True)
    meta = content["meta"]
    meta |= {key: change[key] for key in change.keys() & meta.keys()}
    for old in change.keys() - meta.keys():
        meta["cfg"] = meta["cfg"].replace(old, change[old])
    torch.save(content, tmp_path / "w.pth")
    result = run(app, "predict", tmp_path / "w.pth", pictures, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.startswith("error: ")


def test_a_wrong_export_is_not_written(app, checkpoint, tmp_path, monkeypatch):
    other = timm.create_model("rala_vit_nano", num_classes=10)
    monkeypatch.setattr(
        "linsight.tools.export.save_for_hf",
        lambda model, *args, **kwargs: save_for_hf(other, *args, **kwargs),
    )
    result = run(app, "export", checkpoint, "--out", tmp_path)
    assert result.exit_code == 1
    assert "differs by" in result.output
    assert not list(tmp_path.iterdir())


def test_authors_checkpoint_needs_a_name(app, tmp_path):
    torch.save(timm.create_model("rala_vit_nano").state_dict(), tmp_path / "w.pth")
    result = run(app, "export", tmp_path / "w.pth", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "--model NAME" in result.output
    result = run(
        app, "export", tmp_path / "w.pth", "--model", "rala_vit_nano", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    result = run(app, "export", tmp_path / "w.pth", "--model", "rala_vit_tiny")
    assert result.exit_code == 1
    assert "not of rala_vit_tiny" in result.output


def test_models(app):
    result = run(app, "models", "rala_vit_[nt]*")
    assert result.exit_code == 0
    assert "rala_vit_nano" in result.output
    assert "82.8" in result.output
    assert run(app, "models", "rula*").exit_code == 1


def test_models_are_readable_on_80_columns(app, monkeypatch):
    """The longest name and the longest tag fit."""
    monkeypatch.setenv("COLUMNS", "80")
    for name, tag in (("soft_norm_vit_medium", "in1k*"), ("softmax_swin_tiny", "ms_in22k_ft_in1k")):
        output = run(app, "models", name).output
        assert all(word in output for word in (name, tag, "GMACs", "top-1", "weights", "arXiv"))
        assert "…" not in output


def test_multiply_adds_are_near_the_published():
    """The paper says 2.4 and 4.6 G, but not what it counts; here attention is counted, too."""
    assert models.count("rala_vit_tiny")[1] == pytest.approx(2.4e9, rel=0.1)
    assert models.count("rala_vit_small")[1] == pytest.approx(4.6e9, rel=0.1)


def test_info(app):
    result = run(app, "info")
    assert torch.__version__.split("+")[0] in result.output
    assert "linsight[train]" in result.output


def layers(app, *words):
    """The table of `linsight info MODEL` as {layer: (how many, runs on, what PyTorch computes)}."""
    result = run(app, "info", *words)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    head = next(i for i, line in enumerate(lines) if "how many" in line)
    starts = [lines[head].index(word) for word in ("runs on", "what PyTorch")]
    table = {}
    for line in lines[head + 2 :]:
        if not line.strip():
            return table
        layer, count = line[: starts[0]].split()
        table[layer] = (int(count), line[slice(*starts)].strip(), line[starts[1] :].strip())


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
def test_info_of_a_model(app, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    table = layers(app, "rala_vit_nano")
    assert table["LayerNorm"] == (10, "layer_norm (eager)", "")
    assert table["LinearAttention"] == (2, "projected_linear_attention", "")
    assert table["ResidualDepthwise"] == (10, "depthwise_conv2d", "")
    assert table["SoftmaxAttention"] == (
        3,
        "depthwise_conv2d, projected_softmax_attention (eager), rotary (eager)",
        "scaled_dot_product_attention",
    )
    assert table["PositionBlock"] == (5, "scaled_add (eager)", "")
    assert table["nn.Linear"] == (22, "PyTorch", "matrix products")
    # A batch norm with its ReLU or GELU is one layer; the head's SiLU is a module.
    assert table["BatchNormAct2d"] == (7, "batch_norm (eager)", "")

    other = layers(app, "rala_vit_nano", "norm_layer=rmsnorm", "act_layer=silu", "num_classes=0")
    assert "LayerNorm" not in other
    assert other["timm.RmsNorm"] == (10, "PyTorch", "a norm that the kernels do not know")
    (silus,) = (row for layer, row in other.items() if layer.endswith("SiLU"))
    assert silus[1:] == ("PyTorch", "an activation that is a module")
    assert other["LinearAttention"] == table["LinearAttention"]


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
def test_info_of_sizes_that_a_kernel_does_not_take(app, monkeypatch):
    """Heads of 256 channels, and a local branch of 11 x 11, run in PyTorch."""
    monkeypatch.setenv("COLUMNS", "160")
    wide = layers(
        app, "softmax_swin_tiny", "embed_dim=128", "num_heads=(1,1,1,1)", "depths=(1,1,1,1)"
    )
    assert wide["WindowAttention"][:2] == (4, "PyTorch")
    options = "mixer_options={'rala': {'local_kernel': 11}}"
    assert layers(app, "rala_vit_nano", options)["LinearAttention"][:2] == (2, "PyTorch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rala_vit_tinny"], "nearest models are rala_vit_tiny"),
        (["rala_vit_nano", "norm_layer"], "expected KEY=VALUE"),
        (["rala_vit_nano", "norm_layer=no"], "norm_layer is 'no'"),
        (["rala_vit_nano", "normlayer=no"], "normlayer"),
    ],
)
def test_info_of_no_model(app, words, message):
    result = run(app, "info", *words)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert message in result.output


def test_without_the_training_packages():
    """A message says what to install, and the commands that need nothing more still run."""
    code = """
import sys
sys.modules["mmengine"] = None
from linsight.tools.main import main
for word in ("train", "info"):
    sys.argv = ["linsight", word]
    try:
        main()
    except SystemExit as end:
        print(word, "ends with", end.code or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    # A text is what Python prints to the standard error, and then it exits with 1.
    assert "train ends with error: linsight train needs mmengine" in done.stdout
    assert "pip install 'linsight[train]'" in done.stdout
    assert "info ends with 0\n" in done.stdout, done.stderr


def test_help_of_the_commands_is_their_own():
    """`linsight --help` prints it without importing them."""
    for name, line in linsight_command.COMMANDS.items():
        assert linsight_command.load(name).help.splitlines()[0] == line


def test_help_says_what_other_commands_need(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mmengine", None)
    monkeypatch.setattr(main.app.info, "epilog", None)
    monkeypatch.setattr(sys, "argv", ["linsight", "--help"])
    with pytest.raises(SystemExit):
        main.main()
    output = " ".join(capsys.readouterr().out.split())
    assert "train, test, predict, look, export, convert need mmengine: pip install" in output
    assert "'linsight[train]'" in output
