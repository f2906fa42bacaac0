"""Exported files: what they hold, what they compute, and what becomes of those that fail."""

import copy
import csv
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import typer
from mmengine.registry import DATASETS, MODELS
from mmengine.utils import import_modules_from_strings
from PIL import Image
from rich.progress import Progress
from torch import nn
from typer.testing import CliRunner

import linsight
from linsight.backbones.checkpoint import CheckpointError
from linsight.heads import segmentation  # noqa: F401  registers what the config names
from linsight.heads.deployment import DeployedClassifier
from linsight.tools import export_check, export_file, main
from linsight.tools.config import load_config
from linsight.tools.export import Format, Precision, replace_files, trace, write_file
from linsight.tools.export_accuracy import measure
from linsight.tools.export_file import open_file
from linsight.tools.export_half import lower
from linsight.tools.export_subject import (
    Subject,
    classifier_subject,
    dense_subject,
    open_subject,
    photographs,
)
from linsight.tools.export_tensorrt import main as check_tensorrt
from linsight.tools.export_tensorrt import refusals
from linsight.tools.model import Run

from ..backbones.conftest import lively
from .conftest import full_disk

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# OpenVINO computes in bfloat16 otherwise, where the processor can.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def pixels(*shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)


@pytest.fixture(scope="module")
def classifier():
    """A block of linear attention."""
    options = {"num_classes": 2, "depths": (1, 0, 0, 0), "img_size": 64}
    model = lively(timm.create_model("rala_vit_nano", **options))
    model.pretrained_cfg["label_names"] = ["cat", "dög"]
    return classifier_subject(model)


@pytest.fixture(scope="module")
def tiny(classifier):
    """Two layers, for what does not depend on the model."""
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)
    )
    module = DeployedClassifier(layers, (0.5,) * 3, (0.5,) * 3).eval()
    return replace(classifier, module=module).with_size((64, 64))


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    """A checkpoint of a small segmentor that nobody has trained."""
    words = ["model.backbone.depths=(0,0,1,0)"]
    config = load_config("segformer_rala_vit_nano_digits", words)
    model = MODELS.build(config.model)
    # Without it layers give so little that OpenVINO computes eight bits of it wrongly.
    lively(model.backbone)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.weight)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    path = tmp_path_factory.mktemp("run") / "segmentor.pth"
    names = tuple(f"class {i}" for i in range(model.num_classes))
    meta = {"cfg": config.pretty_text, "dataset_meta": {"classes": names}}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def batches(segmentor):
    """Batches of images, and what the segmentor gives of them."""
    module = open_subject(str(segmentor)).module
    images = [pixels(*shape) for shape in BATCHES]
    with torch.inference_mode():
        return [(each, module(each)) for each in images]


@pytest.fixture(scope="module")
def files(segmentor, tmp_path_factory):
    """The segmentor as ONNX, by the command, under a mask that lets the group read."""
    folder = tmp_path_factory.mktemp("files")
    mask = os.umask(0o027)
    try:
        words = ["export", str(segmentor), "--out", str(folder), "--to", "onnx"]
        result = CliRunner().invoke(main.app, words)
    finally:
        os.umask(mask)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_a_segmentor_as_onnx(files, batches):
    """Any batch and size, the description and readable names, and what the command says."""
    folder, output = files
    path = folder / "model.onnx"
    assert path.stat().st_mode & 0o777 == 0o640
    for phase in ("tracing the graph", "writing model.onnx", "comparing it with the model"):
        assert phase in output
    model = onnx.load(path)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(entries["classes"])[3] == "class 3"
    assert entries["task"] == "segmentation"
    assert {"mean", "std", "linsight_version", "preparation", "inputs"} <= set(entries)
    (images,) = model.graph.input
    dims = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    assert [o.name for o in model.graph.output] == ["labels", "logits"]
    dims = [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "height", "width"]
    assert refusals(model) == []  # TensorRT takes it
    run = open_file(path).run
    wanted = iter([outputs for _, outputs in batches])
    images = [each for each, _ in batches]
    difference = export_check.compare(lambda _: next(wanted), run, images, export_check.EXACT)
    assert difference.faults == ()
    assert len(run(images[0])["labels"].unique()) > 1


def test_what_tensorrt_lacks_is_named(tmp_path):
    """Operators, dtypes and options that its published list does not have."""
    graph = """
        <ir_version: 8, opset_import: ["": 21, "own": 1]>
        main (float[1, 3, 8, 8] x, int64[1] k, uint8[2] u) => (float[1, 3, 16, 16] y) {
            twice = Constant <value = float[4] {1, 1, 2, 2}> ()
            y = Resize <mode = "cubic"> (x, , twice)
            values, places = TopK (x, k)
            size = Shape (u)
            other = Unique (x)
            mine = own.Suppress (x)
        }
    """
    model = onnx.parser.parse_model(graph)
    assert refusals(model) == [
        "opset 21",
        "Resize with mode cubic",
        "TopK that is unsorted, of 3840 or more, or of a number that is no constant",
        "Shape of UINT8",
        "Unique",
        "own.Suppress",
    ]
    onnx.save(model, tmp_path / "model.onnx")
    app = typer.Typer()
    app.command()(check_tensorrt)
    result = CliRunner().invoke(app, [str(tmp_path / "model.onnx")])
    assert result.exit_code == 1
    assert "Resize with mode cubic; TopK that" in result.output


@pytest.mark.slow
def test_upernet_at_any_size():
    """Whose pyramid pools a map of any size to a few cells."""
    config = load_config("upernet_rala_vit_nano_digits", ["model.backbone.depths=(0,0,0,0)"])
    state = MODELS.build(config.model).state_dict()
    subject = dense_subject(Run(config, None, state), "upernet")
    program, reason = trace(subject)
    assert reason == ""
    images = pixels(2, 3, 70, 131)
    with torch.inference_mode():
        wanted, found = (run(images)["logits"] for run in (subject.module, program.module()))
    assert export_check.relative(found, wanted) < 1e-5


RUN_ONNX = """
import sys
sys.modules["linsight"] = sys.modules["torch"] = None
import numpy, onnxruntime
run = onnxruntime.InferenceSession(sys.argv[1]).run
batches, results = sys.argv[2:]
images = numpy.load(batches)
found = {f"{name} {output}": value for name in images.files
         for output, value in zip(("labels", "logits"), run(None, {"images": images[name]}))}
numpy.savez(results, **found)
for wrong in (images["0"][:, :1], images["0"].astype("f")):
    try:
        run(None, {"images": wrong})
    except Exception:
        continue
    raise SystemExit(f"{wrong.shape} {wrong.dtype} is taken")
"""


def test_onnx_without_linsight(files, batches, tmp_path):
    images = {str(i): each.numpy() for i, (each, _) in enumerate(batches)}
    np.savez(tmp_path / "images.npz", **images)
    words = [files[0] / "model.onnx", tmp_path / "images.npz", tmp_path / "results.npz"]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ONNX, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = np.load(tmp_path / "results.npz")
    for i, (_, wanted) in enumerate(batches):
        logits, labels = (torch.from_numpy(results[f"{i} {key}"]) for key in ("logits", "labels"))
        assert export_check.relative(logits, wanted["logits"]) < 1e-4
        assert (labels == wanted["labels"]).float().mean() > 0.999


def test_openvino_runs_the_onnx(files, batches):
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(str(files[0] / "model.onnx"), "CPU", FLOAT32)
    for images, wanted in batches:
        found = model([images.numpy()])
        logits, labels = (torch.from_numpy(found[key].copy()) for key in ("logits", "labels"))
        assert export_check.relative(logits, wanted["logits"]) < 1e-4
        assert (labels == wanted["labels"]).float().mean() > 0.999
    with pytest.raises(RuntimeError):  # of other channels
        model([images[:, :1].numpy()])


def test_a_file_predicts_what_its_checkpoint_predicts(files, segmentor, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (70, 110, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    rows, out = [], tmp_path / "out"
    for source in (segmentor, files[0] / "model.onnx"):
        words = ["predict", source, tmp_path / "noise.png", "--out", out, "--device", "cpu"]
        result = CliRunner().invoke(main.app, list(map(str, words)))
        assert result.exit_code == 0, result.output
        with open(out / "predictions.csv", newline="") as file:
            rows.append(list(csv.reader(file)))
    Image.new("RGB", (16, 64)).save(tmp_path / "small.png")
    words = ["predict", files[0] / "model.onnx", tmp_path / "small.png", "--out", out]
    result = CliRunner().invoke(main.app, list(map(str, words)))
    assert result.exit_code == 1
    assert "small.png (a side of 16 pixels, and the file takes 33 or more)" in result.output
    shares = [{row[1]: float(row[2]) for row in each[1:]} for each in rows]
    assert shares[0].keys() == shares[1].keys()
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)


def weights_of_eight_bits(model) -> list[str]:
    """Which operators have a weight of eight bits, by the operator's name."""
    weights = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    held = {
        n.output[0]: n
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in weights and len(n.input) > 2
    }
    kinds = ("Conv", "Gemm", "MatMul")
    return [n.op_type for n in model.graph.node if n.op_type in kinds and n.input[1] in held]


@pytest.mark.parametrize("calibrated", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("to", [Format.onnx, Format.torch])
def test_eight_bits(tiny, tmp_path, to, calibrated):
    """With pictures to calibrate on both layers have eight bits, without them the linear one."""
    if to is Format.torch:
        pytest.importorskip("torchao")
    pictures = []
    for i, picture in enumerate(photographs() if calibrated else ()):
        picture.save(tmp_path / f"{i}.png")
        pictures.append(tmp_path / f"{i}.png")
    written = write_file(tiny, tmp_path, to, dtype=Precision.int8, calibration=pictures)
    if to is Format.onnx:
        model = onnx.load(written.path)
        assert sorted(weights_of_eight_bits(model)) == (["Conv", "Gemm"] if calibrated else [])
        integer = [node.op_type for node in model.graph.node].count("MatMulInteger")
        assert integer == (0 if calibrated else 1)
    else:
        state = torch.export.load(str(written.path)).state_dict.values()
        shapes = [weight.shape for weight in state if weight.ndim > 1]
        eight = [weight.shape for weight in state if weight.dtype == torch.int8]
        assert sorted(eight) == ([(2, 64), (64, 3, 16, 16)] if calibrated else [(2, 64)])
        assert sorted(shapes) == [(2, 64), (64, 3, 16, 16)]  # none in float32 beside
    opened = open_file(written.path)
    assert opened.description["dtype"] == "int8"
    quantization = opened.description["quantization"]
    assert quantization["layers"] == 1 + calibrated
    assert quantization["pictures"] == len(pictures)
    assert quantization["agreement"] == pytest.approx(written.difference.values)
    images = pixels(3, 3, 64, 64)
    with torch.inference_mode():
        wanted, found = (run(images)["logits"] for run in (tiny.module, opened.run))
    assert 0 < export_check.relative(found, wanted) < 0.1


@pytest.mark.parametrize("calibrated", [True, False], ids=["static", "dynamic"])
def test_products_of_attention_stay_in_float_in_a_graph_of_pytorch(calibrated):
    """And each linear layer and convolution has weights of eight bits."""
    pytest.importorskip("torchao")
    from linsight.tools.export_pt2e import quantize

    options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 64, "num_classes": 5}
    model = lively(timm.create_model("softmax_deit_tiny", mixer="rala", **options))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model, (images,))
    module, layers = quantize(program, [images] if calibrated else None)
    kinds = (nn.Linear, nn.Conv2d) if calibrated else nn.Linear
    names = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds)}
    if calibrated:
        names.add("blocks.0.mixer.attention.local_weight")
    assert layers == len(names)
    assert names.isdisjoint(dict(module.named_parameters()))
    scaled = [n for n in module.graph.nodes if "dequantize_per_tensor" in str(n.target)]
    readers = {str(reader.target) for node in scaled for reader in node.users}
    assert readers == ({"aten.linear.default"} | ({"aten.conv2d.default"} if calibrated else set()))
    with torch.inference_mode():
        assert 0 < export_check.relative(module(images), model(images)) < 0.1


def test_a_matrix_per_head_stays_in_float(tmp_path):
    """ONNX Runtime has no product of integers with a weight of three dimensions."""
    from linsight.tools.export_int8 import quantize

    graph = """
        <ir_version: 8, opset_import: ["": 18]>
        main (float[1, 2, 3, 4] images) => (float[1, 2, 3, 4] y)
        <float[2, 4, 4] heads, float[4, 4] layer> {
            x = MatMul (images, heads)
            y = MatMul (x, layer)
        }
    """
    model = onnx.parser.parse_model(graph)
    for node in model.graph.node:
        node.name = node.output[0]
    draw = np.random.default_rng(0)
    for name, shape in (("heads", (2, 4, 4)), ("layer", (4, 4))):
        weight = draw.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, tmp_path / "model.onnx")
    images = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for batches in (None, [images]):
        assert quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", batches) == 1
        wanted, found = (
            onnxruntime.InferenceSession(tmp_path / name).run(None, {"images": images.numpy()})[0]
            for name in ("model.onnx", "int8.onnx")
        )
        assert 0 < export_check.relative(*map(torch.from_numpy, (found, wanted))) < 0.1


@pytest.mark.parametrize(
    ("name", "task", "metric"),
    [
        ("rala_vit_nano_digits", "classification", "accuracy/top1"),
        ("segformer_rala_vit_nano_digits", "segmentation", "segmentation/mIoU"),
    ],
)
def test_metrics_of_a_file(name, task, metric):
    """A file that gives the data's own labels, of the pixels before they were normalised."""
    loader = "test_dataloader"
    words = [f"{loader}.dataset.length=3", f"{loader}.batch_size=2", f"{loader}.num_workers=0"]
    config = load_config(name, words)
    config[loader].pop("persistent_workers", None)
    import_modules_from_strings(**config.custom_imports)
    data = DATASETS.build(config[loader].dataset)
    seen = []

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        assert images.dtype == torch.uint8
        known = [data[len(seen) + i] for i in range(len(images))]
        seen.extend(images)
        labels = torch.stack([torch.as_tensor(label) for _, label in known])
        logits = nn.functional.one_hot(labels.long(), 11).movedim(-1, 1).float()
        return {"logits": logits}

    with Progress(disable=True) as progress:
        assert measure(run, task, config, progress, "x")[metric] == 100
    mean, std = (torch.tensor(data.metainfo[key])[:, None, None] for key in ("mean", "std"))
    for i, image in enumerate(seen):
        torch.testing.assert_close((image / 255 - mean) / std, data[i][0])


def test_products_of_attention_stay_in_float(files, segmentor, tmp_path):
    """And each linear layer and convolution has weights of eight bits."""
    from linsight.tools.export_int8 import quantize

    target = tmp_path / "int8.onnx"
    layers = quantize(files[0] / "model.onnx", target, [pixels(1, 3, 64, 64)])
    module = open_subject(str(segmentor)).module
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    model = onnx.load(target)
    kinds = weights_of_eight_bits(model)
    assert kinds.count("MatMul") == len(linear)
    assert len(kinds) == layers > len(linear)
    scaled = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    cores = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] not in scaled]
    assert cores
    assert all(scaled.isdisjoint(node.input) for node in cores)
    images = pixels(1, 3, 64, 64)
    with torch.inference_mode():
        wanted = module(images)["logits"]
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    assert 0 < export_check.relative(torch.from_numpy(found), wanted) < 0.2
    openvino = pytest.importorskip("openvino")
    found = openvino.Core().compile_model(str(target), "CPU", FLOAT32)([images.numpy()])["logits"]
    assert 0 < export_check.relative(torch.from_numpy(found.copy()), wanted) < 0.3


# One image and three, of two sizes, one of which is not square.
BATCHES = [(1, 3, 64, 64), (3, 3, 70, 100)]

RUN = """
import json, os, sys
sys.modules["linsight"] = None
os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
import torch
path, batches, results = sys.argv[1:]
if path.endswith(".aoti.pt2"):
    run = torch._inductor.aoti_load_package(path)
    text = run.get_metadata()["linsight.json"]
else:
    extra = {"linsight.json": ""}
    run = torch.export.load(path, extra_files=extra).module()
    text = extra["linsight.json"]
device = json.loads(text).get("device", "cpu")
found = [run(images.to(device))["logits"].cpu() for images in torch.load(batches)]
torch.save((text, found), results)
shapes = (1, 1, 64, 64), (1, 3, 16, 64)
for wrong in (*(torch.zeros(shape).byte() for shape in shapes), torch.zeros(1, 3, 64, 64)):
    try:
        run(wrong)
    except Exception:
        continue
    raise SystemExit(f"{wrong.dtype} {wrong.shape} is taken")
"""


def test_a_package_that_ends_the_process_is_one_line(tmp_path, monkeypatch):
    damaged = tmp_path / "model.aoti.pt2"
    damaged.write_text("no package")
    with pytest.raises(CheckpointError, match=r"cannot be loaded here .*--to torch"):
        export_file.check_package(damaged)
    monkeypatch.setattr(export_file, "_LOAD", "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(CheckpointError, match=r"\(signal 11\): set CXX, which is \S+, to"):
        export_file.check_package(damaged)


def check_alone(subject: Subject, path: Path, batches: list[torch.Tensor]) -> None:
    """A process that cannot import linsight finds the description and computes the logits."""
    results = path.with_name("results.pt")
    torch.save(batches, path.with_name("images.pt"))
    words = [sys.executable, "-c", RUN, str(path), str(path.with_name("images.pt")), str(results)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, found = torch.load(results)
    description = json.loads(text)
    assert description.pop("image_size") == (list(subject.size) if subject.one_size else None)
    assert description.pop("dtype") == "float32"
    assert description == json.loads(json.dumps(subject.description))
    for images, logits in zip(batches, found, strict=True):
        with torch.inference_mode():
            wanted = subject.run(images)["logits"]
        assert export_check.relative(logits, wanted) < (1e-3 if subject.batch else 1e-5)


def test_pt2_without_linsight(classifier, tmp_path):
    written = write_file(classifier, tmp_path, Format.torch)
    assert written.size is None
    assert classifier.description["linsight_version"] == linsight.__version__
    assert classifier.description["mean"] == pytest.approx(timm.data.IMAGENET_DEFAULT_MEAN)
    assert classifier.description["classes"] == ["cat", "dög"]
    check_alone(classifier, written.path, [pixels(*shape) for shape in BATCHES])


def test_a_model_of_grey_images(tmp_path):
    """It predicts, is exported, and its file predicts the same, of coloured pictures too."""
    words = [
        "model.backbone.in_chans=1",
        "model.backbone.depths=(0,0,0,0)",
        "test_dataloader.dataset.transform.mean=(0.5,)",
        "test_dataloader.dataset.transform.std=(0.25,)",
    ]
    config = load_config("rala_vit_nano_digits", words)
    model = MODELS.build(config.model)
    lively(model.backbone)
    meta = {"cfg": config.pretty_text, "dataset_meta": {"classes": tuple("0123456789")}}
    trained = str(tmp_path / "grey.pth")
    torch.save({"meta": meta, "state_dict": model.state_dict()}, trained)
    (tmp_path / "pictures").mkdir()
    for name, mode in (("a.png", "L"), ("b.png", "RGB")):
        picture = Image.fromarray(pixels(64, 64, 3).numpy()).convert(mode)
        picture.save(tmp_path / "pictures" / name)
    found = []
    words = ["export", trained, "--to", "torch", "--size", "64x64"]
    commands = [
        ["predict", trained],
        [*words, "--out", str(tmp_path / "file")],
        ["predict", str(tmp_path / "file" / "model.pt2")],
    ]
    for i, command in enumerate(commands):
        if command[0] == "predict":
            command += [str(tmp_path / "pictures"), "--out", str(tmp_path / f"out{i}")]
        result = CliRunner().invoke(main.app, command)
        assert result.exit_code == 0, result.output
        if command[0] == "predict":
            rows = list(csv.DictReader((tmp_path / f"out{i}" / "predictions.csv").open()))
            found.append([float(row["probability"]) for row in rows])
    assert len(found[0]) == 10  # five classes of each picture
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_a_program_for_batches_of_one_length_takes_any():
    lengths = []

    def program(images):
        lengths.append(len(images))
        return {"logits": images.double().mean((2, 3))}

    images = pixels(5, 3, 8, 8)
    found = export_file._by_batches(program, 2, "cpu")(images)
    assert lengths == [2, 2, 2]
    torch.testing.assert_close(found["logits"], images.double().mean((2, 3)))


@needs_gpu
@pytest.mark.parametrize("dtype", [Precision.float32, Precision.bfloat16])
def test_a_package_for_a_gpu_holds_the_kernels(classifier, tmp_path, dtype):
    subject = classifier.with_size((64, 96)).for_gpu(3)
    written = write_file(subject, tmp_path, Format.aoti, dtype=dtype)
    with zipfile.ZipFile(written.path) as archive:
        kernels = [name for name in archive.namelist() if name.endswith(".cubin")]
    assert any("_read" in name or "_convolve" in name for name in kernels), kernels
    batches = [pixels(3, 3, 64, 96)]
    if dtype is Precision.float32:
        check_alone(subject, written.path, batches)
    found = export_file.open_file(written.path).run(pixels(5, 3, 64, 96))["logits"]
    wanted = subject.run(pixels(5, 3, 64, 96))["logits"]
    assert export_check.relative(found, wanted) < (1e-3 if dtype is Precision.float32 else 0.05)


@pytest.mark.slow  # C++ is compiled for a minute
def test_a_package_without_linsight(classifier, tmp_path):
    fixed = classifier.with_size((64, 64))
    fixed.description["classes"] = ['a "word"', "\\"]  # which C++ has to quote
    written = write_file(fixed, tmp_path, Format.aoti)
    check_alone(fixed, written.path, [pixels(batch, 3, 64, 64) for batch in (1, 3)])


def test_a_failure_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    """A full disk, an interruption, and a file that computes something else than its model."""
    (tmp_path / "model.pt2").write_text("before")
    with full_disk(100_000), pytest.raises(ValueError, match="cannot write to"):
        write_file(tiny, tmp_path, Format.torch)

    def interrupt(phase: str) -> None:
        if phase.startswith("comparing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tiny, tmp_path, Format.torch, interrupt)
    limits = export_check.Limits(logits=-1.0, labels=1.0, objects=1.0)
    monkeypatch.setattr("linsight.tools.export.EXACT", limits)
    with pytest.raises(ValueError, match="differs from the model: the logits differ by"):
        write_file(tiny, tmp_path, Format.torch)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "before"


def test_a_model_of_timms_is_for_one_size_and_says_why(tmp_path):
    path = tmp_path / "my model.pth"
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), path)
    out = tmp_path / "a folder"
    words = ["export", str(path), "--model", "test_vit", "--to", "torch", "--out", str(out)]
    result = CliRunner().invoke(main.app, words)
    assert result.exit_code == 0, result.output
    reason = "For images of 160 x 160 pixels alone: test_vit is not of this library; --size"
    assert reason in result.output
    assert f"linsight predict '{out}/model.pt2'" in result.output
    fixed = classifier_subject(timm.create_model("deit_tiny_patch16_224", depth=1).eval())
    with pytest.raises(ValueError, match=r"--size is 64x96, which deit_tiny.* not take: Input h"):
        fixed.with_size((64, 96))


def test_onnx_of_other_origin_is_refused(tmp_path):
    graph = """
        <ir_version: 8, opset_import: ["": 18]>
        main (float[3] x) => (float[3] y) { y = Relu (x) }
    """
    onnx.save(onnx.parser.parse_model(graph), tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="has no description of linsight export"):
        open_file(tmp_path / "model.onnx")


def test_weights_beyond_one_file_of_onnx_are_refused(tiny, tmp_path, monkeypatch):
    """The exporter would put them into a file beside, which nobody moves to its place."""
    monkeypatch.setattr("linsight.tools.export_onnx.MOST", 100_000)
    with pytest.raises(ValueError, match=r"one file of ONNX holds 0\.0: export with"):
        write_file(tiny, tmp_path, Format.onnx)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_for_long(tmp_path):
    """The next export removes what it has left, and nothing of one that still works."""
    with replace_files(tmp_path) as working:
        left = tmp_path / ".export-killed"
        left.mkdir()
        (left / "model.pt2").write_text("half")
        with replace_files(tmp_path, "model.pt2") as beside:
            (beside / "model.pt2").write_text("whole")
        assert {p.name for p in tmp_path.iterdir()} == {working.name, "model.pt2"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_no_objects_are_no_difference():
    nothing = {"boxes": torch.zeros(1, 2, 4), "labels": torch.full((1, 2), -1)}
    nothing["scores"] = torch.zeros(1, 2)
    same = export_check.compare(
        lambda x: nothing, lambda x: nothing, [pixels(1)], export_check.EXACT
    )
    assert same.faults == ()


def test_objects_that_the_file_alone_has_are_a_difference():
    nothing = {"boxes": torch.zeros(1, 2, 4), "labels": torch.full((1, 2), -1)}
    nothing["scores"] = torch.zeros(1, 2)
    something = {"boxes": torch.tensor([[[0.0, 0, 9, 9], [0, 0, 0, 0]]])}
    something |= {"labels": torch.tensor([[1, -1]]), "scores": torch.tensor([[0.9, 0]])}
    for model, file, share in ((nothing, something, 0.0), (something, something, 1.0)):
        found = export_check.compare(
            lambda x, m=model: m, lambda x, f=file: f, [pixels(1)], export_check.EXACT
        )
        assert found.values["share found again"] == share
        assert bool(found.faults) == (share < 1)


def test_layers_that_overflow_stay_in_float32(classifier):
    """A feed-forward network of large features and an ordinary result."""
    large = replace(classifier, module=copy.deepcopy(classifier.module))
    mlp = large.module.get_submodule("model.stages.0.blocks.0.mlp")
    mlp.fc1.weight.data *= 1e5
    images = pixels(2, 3, 64, 96)
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.mlp\.fc1 overflows float16"):
        lower(large, torch.float16, [images])
    mlp.fc2.weight.data *= 1e-5
    lowered, wide = lower(large, torch.float16, [images])
    assert wide == ("model.stages.0.blocks.0.mlp",)
    with torch.inference_mode():
        wanted, found = (each.module(images)["logits"] for each in (large, lowered))
    assert 0 < export_check.relative(found, wanted) < 1e-2
    lowered, wide = lower(large, torch.bfloat16, [images])
    assert wide == ()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(Precision.float16, 1e-2), (Precision.bfloat16, 5e-2)]
)
def test_half_precision(tiny, tmp_path, dtype, bound):
    """Written, and run back on another batch than that of the comparison."""
    written = write_file(tiny, tmp_path, Format.torch, dtype=dtype)
    assert 0 < written.difference.values["relative error of the logits"] < bound
    opened = open_file(written.path)
    assert opened.description["dtype"] == dtype.value
    program = torch.export.load(str(written.path))
    assert {weight.dtype for weight in program.parameters()} == {getattr(torch, dtype.value)}
    images = pixels(3, 3, 64, 64)
    with torch.inference_mode():
        wanted, found = (run(images)["logits"] for run in (tiny.module, opened.run))
    assert found.dtype == torch.float32
    assert 0 < export_check.relative(found, wanted) < bound


def test_objects_that_are_lost_or_moved_are_seen():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [50, 0, 60, 10]])
    wanted = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2, 3]),
        "scores": torch.tensor([0.9, 0.8, 0.1]),
    }
    same = export_check.match_objects(wanted, wanted)
    assert (same["objects"], same["found"], same["iou"]) == (2, 2, 1.0)
    moved = wanted | {"boxes": boxes + torch.tensor([[0.0], [3.0], [0.0]])}
    assert export_check.match_objects(wanted, moved)["found"] == 1
    other = wanted | {"labels": torch.tensor([2, 2, 3])}
    assert export_check.match_objects(wanted, other)["found"] == 1
    weaker = wanted | {"scores": torch.tensor([0.7, 0.8, 0.1])}
    assert export_check.match_objects(wanted, weaker)["found"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onnx", "--size", "64"], "--size is '64', expected HEIGHTxWIDTH"),
        (["--to", "onnx", "--dtype", "bfloat16"], "--to onnx has no --dtype bfloat16"),
        (["--dtype", "float16"], "are for --to onnx, torch and aoti"),
        (["--size", "64x64"], "are for --to onnx, torch and aoti"),
        (["--device", "cuda"], "--device cuda is for --to aoti, and --to is safetensors"),
        (["--to", "aoti", "--device", "gpu"], "--device is 'gpu', expected cpu or cuda"),
        (["--to", "aoti", "--batch-size", "4"], "--batch-size is for --device cuda"),
        (["--to", "aoti", "--dtype", "int8"], "--dtype int8 is for --to onnx and torch, and"),
        (["--to", "onnx", "--calibrate", "a"], "--calibrate is for --dtype int8"),
        (["--test"], "are for --to onnx, torch and aoti"),
        (["--to", "onnx", "--push-to-hub", "a/b"], "--push-to-hub pushes safetensors"),
    ],
)
def test_wrong_words_are_one_line(segmentor, words, message):
    result = CliRunner().invoke(main.app, ["export", str(segmentor), *words])
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.splitlines()[-1].startswith("error: ")


def test_without_a_compiler(segmentor, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    result = CliRunner().invoke(main.app, ["export", str(segmentor), "--to", "aoti"])
    assert result.exit_code == 1
    assert "error: --to aoti compiles C++, and there is no compiler" in result.output
