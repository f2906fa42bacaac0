"""Export a model: `linsight export MODEL --to safetensors|onnx|torch`."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import timm
import torch
import typer
from rich.console import Console
from safetensors import SafetensorError
from timm.models import push_to_hf_hub, save_for_hf
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram

from linsight.backbones import ZOO
from linsight.backbones.checkpoint import CheckpointError, TimmModel
from linsight.kernels import force
from linsight.tools.model import loading_statement, open_model
from linsight.tools.run import report_errors


class Format(str, Enum):
    """Formats of an exported model."""

    safetensors = "safetensors"
    onnx = "onnx"
    torch = "torch"


def export(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint, an exported folder, or a model with published weights."),
    ],
    to: Annotated[Format, typer.Option(help="torch is torch.export's .pt2.")] = Format.safetensors,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: exports/ and the model's name.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model", help="timm's name, where MODEL does not say it.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also push to the Hugging Face hub.")
    ] = None,
) -> None:
    """Write a model for other programs, and check that the written model computes the same."""
    with report_errors():
        opened = open_model(model, model_name)
        out = out or Path("exports", opened.pretrained_cfg["architecture"])
        write = {
            Format.safetensors: write_safetensors,
            Format.onnx: write_onnx,
            Format.torch: write_torch,
        }[to]
        with Console(stderr=True).status(f"Exporting to {out}, and comparing with the model"):
            path, error, size = write(opened, out)
        print(f"{path}: largest relative difference from the model {error:.1e}")
        if size:
            print(f"For images of {size[0]} x {size[1]} pixels alone, to which its graph is tied")
        if to is Format.safetensors:
            name = opened.pretrained_cfg["architecture"]
            shape = opened.pretrained_cfg["input_size"]
            print(f'Load it with timm.create_model("local-dir:{out}", pretrained=True), or')
            print(f"  {loading_statement(name, path, opened.num_classes, shape)}")
        if push_to_hub:
            push_to_hf_hub(opened, push_to_hub, model_config=_config(opened))
            print(f"Pushed to {push_to_hub}")


# The file, its error, and the only image size (height, width) that it takes, or None for any size.
Written = tuple[Path, float, tuple[int, int] | None]


def write_safetensors(model: TimmModel, folder: Path) -> Written:
    """Write ``model.safetensors`` and timm's ``config.json``."""
    with replace_files(folder, "model.safetensors", "config.json") as beside:
        save_for_hf(model, str(beside), model_config=_config(model), safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{beside}", pretrained=True).eval()
        error = compare(model, loaded, _images(model, _any_size(model)), limit=0.0)
    return folder / "model.safetensors", error, None


def write_onnx(model: TimmModel, folder: Path) -> Written:
    """Write ``model.onnx``, checked in ONNX Runtime."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        raise CheckpointError(f"ONNX needs {', '.join(missing)}: pip install 'linsight[export]'")
    import onnxruntime

    with replace_files(folder, "model.onnx") as beside, force("reference"):
        program, images, size = trace(model)
        exported = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
        )
        cast(torch.onnx.ONNXProgram, exported).save(beside / "model.onnx")
        session = onnxruntime.InferenceSession(beside / "model.onnx")

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

        error = compare(model, run, images, limit=1e-4)
    return folder / "model.onnx", error, size


def write_torch(model: TimmModel, folder: Path) -> Written:
    """Write ``model.pt2`` of `torch.export`."""
    with replace_files(folder, "model.pt2") as beside, force("reference"):
        program, images, size = trace(model)
        torch.export.save(program, beside / "model.pt2")
        loaded = torch.export.load(beside / "model.pt2").module()
        error = compare(model, loaded, images, limit=1e-5)
    return folder / "model.pt2", error, size


def trace(model: TimmModel) -> tuple[ExportedProgram, list[Tensor], tuple[int, int] | None]:
    """Trace a model for batches of any length and, where possible, for images of any size.

    What is constant in inference, such as batch norms behind convolutions, is folded before.

    Models with windows or landmarks depend on the size of the image in ways that one graph cannot
    express, and are traced at their own size.

    Returns:
        The graph, the batches to compare it on, and its only image size (height, width), or None
        for any size.
    """
    model = cast(TimmModel, reparameterize_model(model))
    shape: dict[int, Any] = {0: Dim("batch", min=1, max=4096)}
    if _any_size(model):
        images = _images(model, True)
        # A side of 32 pixels leaves one row, which torch.export would treat as a constant.
        sides = {2: Dim("height", min=33, max=8192), 3: Dim("width", min=33, max=8192)}
        try:
            dynamic = (shape | sides,)
            return torch.export.export(model, (images[0],), dynamic_shapes=dynamic), images, None
        except UserError:  # torch.export cannot leave the size open
            pass
    images = _images(model, False)
    program = torch.export.export(model, (images[0],), dynamic_shapes=(shape,))
    height, width = images[0].shape[2:]
    return program, images, (height, width)


@contextmanager
def replace_files(folder: Path, *names: str) -> Iterator[Path]:
    """Yield an empty folder, whose files `names` replace those in `folder` if no error occurs."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield beside
        for name in names:
            os.replace(beside / name, folder / name)
    except SafetensorError as error:  # its writer raises this on a full disk
        raise CheckpointError(
            f"cannot write to {folder}: {error}; what was there before is untouched"
        ) from error
    finally:
        shutil.rmtree(beside)


def compare(
    model: nn.Module, other: Callable[[Tensor], Tensor], batches: list[Tensor], limit: float
) -> float:
    """The largest relative L2 difference of the outputs over the batches.

    Raises:
        CheckpointError: the difference is above `limit`.
    """
    worst = 0.0
    with torch.inference_mode():
        for images in batches:
            wanted = model(images)
            worst = max(worst, ((other(images) - wanted).norm() / wanted.norm()).item())
    if not worst <= limit:
        raise CheckpointError(
            f"the exported model differs by {worst:.1e}, more than {limit:.0e}; nothing was written"
        )
    return worst


def _any_size(model: TimmModel) -> bool:
    return model.pretrained_cfg["architecture"] in ZOO


def _images(model: TimmModel, any_size: bool) -> list[Tensor]:
    """Random batches, of which the first has the model's own image size."""
    channels, height, width = model.pretrained_cfg["input_size"]
    others = [(1, height + 32, width), (3, 75, 97)] if any_size else [(1, height, width)]
    sizes = [(2, height, width), *others]
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(b, channels, h, w, generator=draw) for b, h, w in sizes]


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
