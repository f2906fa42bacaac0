"""`linsight app` without a browser: what its page shows, and what it refuses."""

import re
import socket
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("gradio", reason="gradio is not installed: pip install linsight[app]")

import gradio as gr

from linsight.data.digits import digit_scene
from linsight.tools.app_page import Answers, build_page, examples, pixels_that_fit
from linsight.tools.main import app
from linsight.tools.predict import open_predictor
from linsight.tools.results import Classes, Objects, Regions

from ..app.models import write_checkpoint


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    file = write_checkpoint("classifier", tmp_path_factory.mktemp("app"))
    device = torch.device("cpu")
    return Answers(open_predictor(str(file), None, device), 100_000, device)


def test_a_picture_is_predicted_and_looked_into(answers):
    picture = Image.fromarray(digit_scene(3, "test", size=(64, 96)).image)
    drawing, took, rows, image = answers.predict(picture)
    assert drawing.size[0] > 500
    scores = answers.predictor.predict(picture)
    assert re.fullmatch(r"\d+ ms for 96 x 64 pixels", took)
    assert rows == [[name, f"{share:.6f}"] for name, share in scores.top(5)]
    seen, looks = answers.look(image)
    assert seen.size == image.shape[:1:-1]
    assert looks.size[0] > 500
    assert len(build_page(answers, "a title", [picture]).fns) >= 4


def test_what_is_no_picture_or_too_large(answers, tmp_path):
    (tmp_path / "<b>.png").write_text("some words")
    Image.new("L", (400, 251)).save(tmp_path / "large.png")
    png = (tmp_path / "large.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png[24:29]
    (tmp_path / "bomb.png").write_bytes(
        png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    )
    for name, said in (
        ("<b>.png", r"^&lt;b&gt;\.png is no picture, or it is damaged$"),
        ("large.png", r"has 400 x 251 pixels, and at most 100,000 are taken: .*--max-pixels$"),
        ("bomb.png", "larger than 100,000 pixels"),
    ):
        with pytest.raises(gr.Error) as found:
            answers.read(tmp_path / name)
        assert re.search(said, found.value.message)
    Image.new("I;16", (400, 250)).save(tmp_path / "deep.png")
    assert answers.read(tmp_path / "deep.png").mode == "RGB"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_picture_that_memory_does_not_hold(answers, monkeypatch, error):
    def fail(picture):
        raise error

    monkeypatch.setattr(answers.predictor, "predict", fail)
    with pytest.raises(gr.Error, match="does not fit into memory: give a smaller one"):
        answers.predict(Image.new("RGB", (64, 64)))


def test_more_memory_per_pixel_means_fewer_pixels():
    nothing = np.zeros((0, 4), np.float32)
    labels = np.zeros((2, 2), np.int64)
    cpu = torch.device("cpu")
    results = [
        Classes(["cat"], np.ones(1, np.float32)),
        Objects(["cat"], nothing, nothing[:, 0], nothing[:, 0], np.zeros((0, 2, 2), bool)),
        Regions(["cat"], labels),
        Regions(["cat"] * 1000, labels),
    ]
    limits = [pixels_that_fit(result, cpu) for result in results]
    assert limits == sorted(set(limits), reverse=True)
    assert limits[0] <= Image.MAX_IMAGE_PIXELS
    assert min(picture.width for picture in examples(results[0])) > 400  # photographs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port"),
        (["rala_vit_nano", "--device", "gpu"], "--device is 'gpu', expected such as cpu"),
        (["rala_vit_tinny"], "nearest models are rala_vit_tiny"),
        ([], "there is no work_dirs/*/best_*.pth here: give a checkpoint"),
    ],
)
def test_wrong_words_are_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = CliRunner().invoke(app, ["app", *words, "--port", str(port)])
    assert result.exit_code == 1
    assert said in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = CliRunner().invoke(app, ["app", "rala_vit_nano", "--port", str(port)])
    assert result.exit_code == 1
    assert f"--port {port}: no server can listen there (Address already in use" in result.output


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "linsight.tools.app_page")
    result = CliRunner().invoke(app, ["app", "rala_vit_nano"])
    assert result.exit_code == 1
    assert "linsight app needs gradio: pip install 'linsight[app]'" in result.output
