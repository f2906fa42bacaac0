"""Export a model: `linsight export MODEL --to safetensors|onnx|torch|aoti`."""

import fcntl
import io
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from huggingface_hub import HfApi
from mmengine.config import Config
from PIL import Image
from rich.console import Console
from rich.progress import Progress, track
from safetensors import SafetensorError
from timm.models import push_to_hf_hub, save_for_hf
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torchvision.transforms.v2 import functional

from linsight.backbones.checkpoint import CheckpointError, TimmModel
from linsight.heads.hooks import percent
from linsight.kernels import force
from linsight.kernels.runtime.private import remember_accesses
from linsight.tools.config import ConfigError
from linsight.tools.export_accuracy import measure
from linsight.tools.export_check import (
    EIGHT,
    EXACT,
    HALF,
    Difference,
    compare,
    refuse_faults,
    relative,
)
from linsight.tools.export_file import DESCRIPTION, ExportedFile, check_package, open_file
from linsight.tools.export_half import lower
from linsight.tools.export_subject import (
    Subject,
    batch_of,
    batches_for,
    open_subject,
    photographs,
    preparation_of,
)
from linsight.tools.model import loading_statement, open_model, read_run
from linsight.tools.predict import find_pictures, open_picture
from linsight.tools.run import report_errors


class Format(str, Enum):
    """Formats of an exported model."""

    safetensors = "safetensors"
    onnx = "onnx"
    torch = "torch"
    aoti = "aoti"


class Precision(str, Enum):
    """Dtypes of an exported graph."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


# The beginning of the name of the folder in which files are written before they take their places.
_BESIDE = ".export-"
FILES = {Format.onnx: "model.onnx", Format.torch: "model.pt2", Format.aoti: "model.aoti.pt2"}


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, a training's folder, an exported folder, or a model with published "
            "weights."
        ),
    ],
    to: Annotated[
        Format,
        typer.Option(help="torch is torch.export's .pt2, aoti a package of machine code."),
    ] = Format.safetensors,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: exports/ and the model's name.")
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option("--model", help="timm's name, or a config's, where MODEL does not say it."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH", help="Take images of this size alone; not safetensors."
        ),
    ] = None,
    dtype: Annotated[
        Precision,
        typer.Option(
            help="Of the graph; layers that overflow in float16 stay in float32. int8 is of linear "
            "layers and convolutions, for --to onnx and torch."
        ),
    ] = Precision.float32,
    device: Annotated[
        str, typer.Option(help="cuda: machine code for this machine's GPU, with --to aoti.")
    ] = "cpu",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images that a package for a GPU takes at once; default: 1."),
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Pictures or folders of them that say how large the inputs of int8's layers are; "
            "without, each run measures its own, and convolutions stay in float32."
        ),
    ] = None,
    test: Annotated[
        bool,
        typer.Option("--test", help="Measure the model and the file on the config's test data."),
    ] = False,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(help="Pictures or folders of them, to compare on."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also push to the Hugging Face hub.")
    ] = None,
) -> None:
    """Write a model for other programs, and check that the written model computes the same."""
    with report_errors():
        to, dtype = Format(to), Precision(dtype)  # a call from Python may name them
        check_device(to, device, batch_size)
        if to is Format.safetensors:
            if size or pictures or calibrate or test or dtype is not Precision.float32:
                raise ConfigError(
                    "--size, --dtype, --pictures, --calibrate and --test are for --to onnx, torch "
                    "and aoti"
                )
            _export_weights(model, model_name, out, push_to_hub)
            return
        if push_to_hub:
            raise ConfigError(f"--push-to-hub pushes safetensors, and --to is {to.value}")
        if to is Format.onnx and dtype is Precision.bfloat16:
            raise ConfigError("--to onnx has no --dtype bfloat16, which ONNX Runtime lacks on CPUs")
        if dtype is Precision.int8 and to is Format.aoti:
            raise ConfigError("--dtype int8 is for --to onnx and torch, and --to is aoti")
        if calibrate and dtype is not Precision.int8:
            raise ConfigError(f"--calibrate is for --dtype int8, and --dtype is {dtype.value}")
        report = Phases()
        report("opening the model")
        check_tools(to, dtype)
        subject = open_subject(model, model_name, onnx=to is Format.onnx)
        if size:
            subject = subject.with_size(_size(size))
        if device == "cuda":
            subject = subject.for_gpu(batch_size or 1)
        folder = out or Path("exports", subject.name)
        shown = [open_picture(file) for file in find_pictures(pictures)] if pictures else None
        seen = find_pictures(calibrate) if calibrate else []
        config = _test_config(model, model_name) if test else None
        written = write_file(subject, folder, to, report, shown, dtype, seen, config)
        print(f"{written.path}: compared with the model: {written.difference}")
        for name, (before, after) in written.metrics.items():
            print(f"{name}: {before:.2f} before, {after:.2f} after")
        if written.size:
            height, width = written.size
            print(f"For images of {height} x {width} pixels alone: {written.reason}")
        if written.wide:
            print(f"In float32, as {dtype.value} overflows there: {', '.join(written.wide)}")
        print(f"Try it with: linsight predict {shlex.quote(str(written.path))} PICTURES")


def _test_config(source: str, name: str | None) -> Config:
    run = read_run(source, name)
    if run is None:
        raise ConfigError(f"--test needs a checkpoint of linsight train, and MODEL is {source}")
    return run.config


def _export_weights(
    source: str, model_name: str | None, out: Path | None, push_to_hub: str | None
) -> None:
    opened = open_model(source, model_name)
    name = opened.pretrained_cfg["architecture"]
    shape = opened.pretrained_cfg["input_size"]
    folder = out or Path("exports", name)
    path, error = write_safetensors(opened, folder)
    print(f"{path}: largest relative difference from the model {error:.1e}")
    print(f'Load it with timm.create_model("local-dir:{folder}", pretrained=True), or')
    print(f"  {loading_statement(name, path, opened.num_classes, shape)}")
    if push_to_hub:
        push_to_hf_hub(opened, push_to_hub, model_config=_config(opened))
        HfApi().upload_file(
            path_or_fileobj=folder / "config.json", path_in_repo="config.json", repo_id=push_to_hub
        )
        print(f"Pushed to {push_to_hub}")


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not sides:
        raise ConfigError(f"--size is {text!r}, expected HEIGHTxWIDTH such as 512x768")
    return int(sides[1]), int(sides[2])


class Phases:
    """Says on the standard error what an export does, and how long it has taken so far."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.start = time.monotonic()

    def __call__(self, phase: str) -> None:
        self.console.print(f"{time.monotonic() - self.start:6.1f} s  {phase}", highlight=False)


@dataclass(frozen=True)
class Written:
    """What an export has written.

    Attributes:
        path: the file.
        difference: what differs from the model.
        size: the only image size (height, width) that it takes, or None for any size.
        reason: why there is only one.
        wide: names of the modules that stay in float32 in a graph of half precision.
        metrics: of the model and of the file on test data, in percent, by their names.
    """

    path: Path
    difference: Difference
    size: tuple[int, int] | None
    reason: str
    wide: tuple[str, ...]
    metrics: dict[str, tuple[float, float]]


def write_safetensors(model: TimmModel, folder: Path) -> tuple[Path, float]:
    """Write ``model.safetensors`` and timm's ``config.json``, and return the relative error."""
    with replace_files(folder, "model.safetensors", "config.json") as beside:
        save_for_hf(model, str(beside), model_config=_config(model), safe_serialization=True)
        _state_classes_once(beside / "config.json")
        loaded = timm.create_model(f"local-dir:{beside}", pretrained=True).eval()
        images = torch.rand(2, *model.pretrained_cfg["input_size"])
        with torch.inference_mode():
            error = relative(loaded(images), model(images))
        if not error == 0:
            raise CheckpointError(
                f"the exported model differs by {error:.1e}, more than 0; nothing was written"
            )
    return folder / "model.safetensors", error


def _state_classes_once(config: Path) -> None:
    """Leave the number of classes out of the arguments of the model, in place.

    It stands at the top of the file as well, from where transformers passes it by itself.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    content.get("model_args", {}).pop("num_classes", None)
    config.write_text(json.dumps(content, indent=2), encoding="utf-8")


def check_device(to: Format, device: str, batch_size: int | None) -> None:
    """Raise a ConfigError unless a format has programs for a device that is there."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {device!r}, expected cpu or cuda")
    if device == "cuda" and to is not Format.aoti:
        raise ConfigError(
            f"--device cuda is for --to aoti, and --to is {to.value}, whose files any device runs"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, and PyTorch sees no GPU here")
    if batch_size and device != "cuda":
        raise ConfigError(
            "--batch-size is for --device cuda; elsewhere a file takes batches of any length"
        )


def check_tools(to: Format, dtype: Precision = Precision.float32) -> None:
    """Raise a CheckpointError if what a format needs is not installed."""
    if to is Format.torch and dtype is Precision.int8 and not find_spec("torchao"):
        raise CheckpointError(".pt2 of eight bits needs torchao: pip install 'linsight[export]'")
    if to is Format.onnx:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
        if missing:
            raise CheckpointError(
                f"ONNX needs {', '.join(missing)}: pip install 'linsight[export]'"
            )
    if to is Format.aoti:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise CheckpointError(
                "--to aoti compiles C++, and there is no compiler: apt install g++, or set CXX"
            ) from None


def write_file(
    subject: Subject,
    folder: Path,
    to: Format,
    report: Callable[[str], None] = lambda phase: None,
    pictures: Sequence[Image.Image] | None = None,
    dtype: Precision = Precision.float32,
    calibration: Sequence[Path] = (),
    test: Config | None = None,
) -> Written:
    """Write a model's graph, and compare it with the model before it takes its place.

    Args:
        subject: the model.
        folder: where the file goes.
        to: its format.
        report: called with the name of each phase as it begins.
        pictures: what to compare on; by default photographs.
        dtype: of the graph. Layers that overflow in half precision stay in float32.
        calibration: files of pictures that tell the range of the inputs of int8's layers.
        test: a config, on whose test data both are measured.

    Raises:
        CheckpointError: the graph computes something else, or cannot be written. The files that
            were there are untouched.
    """
    name = FILES[to]
    # What PyTorch keeps of each operator's shapes takes longer to keep than to find again.
    fresh = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    # A package for a GPU holds the kernels; other programs have PyTorch's operators alone.
    kernels = force("auto" if to is Format.aoti and subject.device.type == "cuda" else "reference")
    with replace_files(folder, name) as beside, kernels, fresh:
        traced, wide, limits = subject, (), EXACT
        if dtype in (Precision.float16, Precision.bfloat16):
            report(f"looking for what overflows in {dtype.value}")
            seen = batch_of(list(pictures or photographs())[:4], subject.size, subject.channels)
            seen = seen.to(subject.device)
            traced, wide = lower(subject, getattr(torch, dtype.value), [seen])
            limits = HALF
        report("tracing the graph")
        program, reason = trace(traced)
        size = subject.size if reason else None
        description = subject.description | {"dtype": dtype.value, "image_size": size}
        layers = 0
        if dtype is Precision.int8 and to is Format.torch:
            report("choosing the scales of eight bits")
            from linsight.tools import export_pt2e

            seen = calibration_images(subject, size, calibration)
            module, layers = export_pt2e.quantize(program, seen)
            report("tracing the graph of eight bits")
            program = _trace(replace(subject, module=module), any_size=size is None)
        report(f"writing {name}")
        save(program, beside / name, to, subject.outputs, description)
        if dtype is Precision.int8 and to is Format.onnx:
            report("choosing the scales of eight bits")
            from linsight.tools import export_int8

            seen = calibration_images(subject, size, calibration)
            layers = export_int8.quantize_file(beside / name, seen)
        if layers:
            report(f"{layers} layers have eight bits")
            description["quantization"] = {"layers": layers, "pictures": len(calibration)}
            limits = EIGHT
        report("comparing it with the model on pictures")
        if subject.device.type == "cuda":
            check_package(beside / name)
        opened = open_file(beside / name)
        compared = batches_for(subject, size is None, pictures)
        difference = compare(subject.run, opened.run, compared, limits)
        refuse_faults(difference)
        metrics = _measure(subject, opened, test, report) if test else {}
        if dtype is Precision.int8:
            description["quantization"] |= {"agreement": difference.values, "metrics": metrics}
            if to is Format.onnx:
                export_int8.describe(beside / name, description)
            else:
                save(program, beside / name, to, subject.outputs, description)
    report(f"done, {(folder / name).stat().st_size / 1e6:.1f} MB")
    return Written(folder / name, difference, size, reason, wide, metrics)


def calibration_images(
    subject: Subject, size: tuple[int, int] | None, pictures: Sequence[Path]
) -> Iterator[Tensor] | None:
    """Each picture as `linsight predict` gives it to the graph, uint8 (1, C, H, W).

    Args:
        subject: the model.
        size: height and width of the images, if the graph takes no others.
        pictures: files of pictures; without any there are no images.

    Raises:
        DataError: a picture cannot be read.
    """
    return _prepared(subject, size, pictures) if pictures else None


def _prepared(
    subject: Subject, size: tuple[int, int] | None, pictures: Sequence[Path]
) -> Iterator[Tensor]:
    prepare = preparation_of(subject.description)
    for file in track(pictures, "Calibrating", console=Console(stderr=True)):
        image = prepare(open_picture(file))
        if subject.task == "detection":
            image, _ = image
        if size or min(image.shape[1:]) < subject.least:
            image = functional.resize(image, list(size or subject.size))
        yield image[None].contiguous()


def _measure(
    subject: Subject, opened: ExportedFile, config: Config, report: Callable[[str], None]
) -> dict[str, tuple[float, float]]:
    """Metrics in percent of a model and of its file, on the test data of its config."""
    found = []
    with Progress(console=Console(stderr=True)) as progress:
        for name, run in (("the model", subject.run), ("the file", opened.run)):
            report(f"measuring {name} on the test data")
            found.append(measure(run, subject.task, config, progress, name))
    before, after = found
    return {
        name: (percent(name, value), percent(name, after.get(name, float("nan"))))
        for name, value in before.items()
        if value >= 0  # COCO's precision is -1 for a size of which the data have no object.
    }


def save(
    program: ExportedProgram,
    file: Path,
    to: Format,
    outputs: Sequence[str],
    description: dict[str, Any],
) -> None:
    """Write a graph and its description in a format."""
    if to is Format.onnx:
        from linsight.tools import export_onnx

        export_onnx.save(program, file, outputs, description)
        return
    # Into memory first, because torch's own writer of files ends the process on a full disk.
    content = io.BytesIO()
    if to is Format.torch:
        torch.export.save(program, content, extra_files={DESCRIPTION: json.dumps(description)})
    else:
        with remember_accesses():
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=content,
                inductor_configs={
                    "aot_inductor.metadata": {DESCRIPTION: json.dumps(description)},
                    # Where inputs are checked, a batch of one image is none too few.
                    "aot_inductor.check_lowerbound": False,
                },
            )
    file.write_bytes(content.getbuffer())


def trace(subject: Subject) -> tuple[ExportedProgram, str]:
    """Trace a model for batches of any length and, where possible, for images of any size.

    Models with windows or landmarks depend on the size of the image in ways that one graph cannot
    express, and are traced at their own size.

    Returns:
        The graph, and why its images have one size alone; "" if they have any.
    """
    reason = subject.one_size
    if not reason:
        try:
            return _trace(subject, any_size=True), ""
        # PyTorch raises errors of many classes where a size cannot be left open.
        except Exception:
            reason = f"a graph of {subject.name} cannot leave the size open; --size gives another"
    return _trace(subject, any_size=False), reason


def _trace(subject: Subject, any_size: bool) -> ExportedProgram:
    count = subject.batch or 2
    images = batch_of((photographs() * count)[:count], subject.size, subject.channels)
    images = images.to(subject.device)
    shape: dict[int, Any] = {} if subject.batch else {0: Dim("batch", min=1, max=4096)}
    if any_size:
        sides = {"min": subject.least, "max": 8192}
        shape |= {2: Dim("height", **sides), 3: Dim("width", **sides)}
    with torch.no_grad():
        return torch.export.export(subject.module, (images,), dynamic_shapes=(shape,))


@contextmanager
def replace_files(folder: Path, *names: str) -> Iterator[Path]:
    """Yield an empty folder, whose files `names` replace those in `folder` if no error occurs."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_remains(folder)
    beside = Path(tempfile.mkdtemp(prefix=_BESIDE, dir=folder))
    lock = _lock(beside)
    try:
        yield beside
        for name in names:
            os.chmod(beside / name, 0o666 & ~_umask())
            os.replace(beside / name, folder / name)
    # On a full disk safetensors' writer raises its own error.
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot write to {folder}: {error}; what was there before is untouched"
        ) from error
    finally:
        shutil.rmtree(beside)
        if lock is not None:
            os.close(lock)


def _remove_remains(folder: Path) -> None:
    """Remove what exports into a folder have left that were killed."""
    for beside in folder.glob(f"{_BESIDE}*"):
        if (lock := _lock(beside)) is not None:
            shutil.rmtree(beside, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder, which ends with the process, or None if it is another export's."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # it is gone, or somebody else's
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _umask() -> int:
    """The process's file mode mask, which is read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _config(model: TimmModel) -> dict[str, Any]:
    """Entries of timm's config.json beyond the model's own configuration."""
    labels = model.pretrained_cfg.get("label_names")
    entries = {"num_classes": model.num_classes} | ({"label_names": list(labels)} if labels else {})
    # `reset_classifier` changes what timm itself reads from the model; dropout is for training.
    arguments = {
        key: value
        for key, value in getattr(model, "model_args", {}).items()
        if key not in ("num_classes", "global_pool") and "drop" not in key
    }
    return entries | ({"model_args": arguments} if arguments else {})
