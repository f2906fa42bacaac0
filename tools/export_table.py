"""Export a shallow model of each body for each task, and write the table of docs/export.md.

``python -m linsight.tools.export_table [BODY...] [--task TASK]...`` replaces the rows of what it
exports. A model has one block per stage and random weights, as the question is whether a graph
computes what the model computes. Each row is made by a process of its own, since the compilers and
runtimes that a row goes through may end theirs.
"""

from __future__ import annotations

import copy
import multiprocessing
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

import linsight.heads.segmentation  # noqa: F401  registers what configs name
from linsight.backbones import ZOO
from linsight.backbones.checkpoint import CheckpointError
from linsight.kernels import force
from linsight.tools.config import load_config, quiet_mmdet
from linsight.tools.docs_table import write_row
from linsight.tools.export import Format, write_file
from linsight.tools.export_check import EXACT, compare
from linsight.tools.export_subject import Subject, batches_for, classifier_subject, dense_subject
from linsight.tools.model import Run
from linsight.tools.models import read_counts

HEAD = (
    *("body", "model", "task", "file", "image sizes", "run by", "differs from the model"),
    "also taken by",
)
CONFIGS = {
    "UPerNet": "upernet_rala_vit_nano_digits",
    "Semantic FPN": "semantic_fpn_rala_vit_nano_digits",
    "SegFormer": "segformer_rala_vit_nano_digits",
    "RetinaNet": "retinanet_rala_vit_nano_fpn_digits",
    "Faster R-CNN": "mask_rcnn_rala_vit_nano_fpn_digits",
    "Mask R-CNN": "mask_rcnn_rala_vit_nano_fpn_digits",
    "Cascade R-CNN": "cascade_mask_rcnn_rala_vit_nano_fpn_digits",
    "Cascade Mask R-CNN": "cascade_mask_rcnn_rala_vit_nano_fpn_digits",
    "DINO": "dino_4scale_rala_vit_nano_digits",
}
TASKS = ("classification", *CONFIGS)
# Runs a .pt2 or a package where linsight cannot be imported.
ALONE = """
import sys
sys.modules["linsight"] = None
import torch, torchvision
file, images, results = sys.argv[1:]
if file.endswith(".aoti.pt2"):
    run = torch._inductor.aoti_load_package(file)
else:
    run = torch.export.load(file).module()
torch.save([run(x) for x in torch.load(images)], results)
"""


def bodies() -> dict[str, str]:
    """From each skeleton's name to its smallest model."""
    parameters = {name: counts[0] for name, counts in read_counts().items()}
    names: dict[str, str] = {}
    for name in sorted(ZOO, key=parameters.__getitem__):
        names.setdefault(ZOO[name].family.skeleton.__name__, name)
    return names


def shallow(name: str) -> dict[str, Any]:
    """Arguments that leave a model one block per stage, or all where they are listed by block."""
    config = ZOO[name].family.config | ZOO[name].config
    mixer = config.get("mixer", "")
    if not isinstance(mixer, str) and any(not isinstance(names, str) for names in mixer):
        return {}
    return {"depths": [1] * len(config["depths"])} if "depths" in config else {"depth": 1}


def subject_of(model: str, task: str, onnx: bool) -> Subject:
    """A model of random weights."""
    torch.manual_seed(0)
    options = shallow(model)
    if task == "classification":
        classifier: Any = timm.create_model(model, **options).eval()
        return classifier_subject(classifier)
    config = load_config(CONFIGS[task])
    config.model.backbone.update(model_name=model, **options)
    if task in ("Faster R-CNN", "Cascade R-CNN"):
        config.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
    return build_untrained(config, model, onnx)


def build_untrained(config: Config, name: str, onnx: bool = False) -> Subject:
    """The segmentor or detector of a config, with random weights; errors call it `name`."""
    with quiet_mmdet(), DefaultScope.overwrite_default_scope(config.default_scope):
        # Some of mmdet's classes change the config that they are built of.
        built = MODELS.build(copy.deepcopy(config.model))
    _enliven(built)
    return dense_subject(Run(config, None, built.state_dict()), name, onnx)


def _enliven(model: nn.Module) -> None:
    """Let the heads of an untrained model give objects and labels that differ."""
    for key, weight in model.named_parameters():
        if weight.ndim == 1 or any(part in key for part in ("_cls", "_reg", "sampling")):
            weight.data += (0.01 if "retina" in key else 0.03) * torch.randn(weight.shape)
        if key.endswith("retina_cls.weight"):
            weight.data /= 4  # so that the best scores are not all 1


def results_of(model: str, task: str, to: Format, size: tuple[int, int] | None = None) -> list[str]:
    """The sizes that a file takes, by what it was run, and how its outputs differ.

    Args:
        model: the backbone.
        task: one of `TASKS`.
        to: the file.
        size: the only (height, width) that it is to take; by default any.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            subject = subject_of(model, task, to is Format.onnx)
            subject = subject.with_size(size) if size else subject
            written = write_file(subject, Path(folder), to)
        except (CheckpointError, ValueError) as error:
            return ["", "", f"not written: {error}", ""]
        # Compilers raise errors of many classes.
        except Exception as error:
            traceback.print_exc()
            return ["", "", f"not written: {_reason(error)}", ""]
        batches = batches_for(subject, written.size is None)
        used, other = ("ONNX Runtime", "OpenVINO"), _openvino
        if to is not Format.onnx:
            used, other = ("PyTorch", "PyTorch without linsight"), _alone
        try:
            found = iter(other(written.path, subject, batches))
            with force("reference"):  # as the export itself compares
                second = str(compare(subject.module, lambda _: next(found), batches, EXACT))
        # Each runtime has errors of its own.
        except Exception as error:
            second = f"fails: {_reason(error)}"
        taken = _taken_by(written.path, subject, written.size)
    first = str(written.difference)
    sizes = "any" if written.size is None else "{} x {}".format(*written.size)
    same = first == second
    return [sizes, ", ".join(used), first if same else f"{first}; {used[1]}: {second}", taken]


def by_child(make: Callable[..., list[str]], *args: Any) -> list[str]:
    """What `make` returns in a process of its own, or a row's cells that say how that ended."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, make, *args))
    process.start()
    process.join()
    if process.exitcode:
        return ["", "", f"not written: the process ended with {process.exitcode}", ""]
    return receiver.recv()


def _send(sender: Connection, make: Callable[..., list[str]], *args: Any) -> None:
    sender.send(make(*args))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:120].replace("|", "/")


def _taken_by(file: Path, subject: Subject, size: tuple[int, int] | None) -> str:
    """Which converters take a file, and of those that do not, why: TensorRT by its list."""
    if file.suffix == ".onnx":
        import onnx

        from linsight.tools.export_tensorrt import refusals

        missing = refusals(onnx.load(file))
        return f"not TensorRT: {', '.join(missing)}" if missing else "TensorRT"
    if file.name.endswith(".aoti.pt2"):
        return ""
    images = batches_for(subject.with_size(size or (64, 96)), False)[0]
    said = [
        _conversion("CoreML", _to_coreml, file, subject, images),
        _conversion("ExecuTorch", _to_executorch, file, subject, images),
    ]
    return ", ".join(filter(None, said))


def _conversion(name: str, convert: Any, file: Path, subject: Subject, images: Tensor) -> str:
    """What comes of a conversion; "" without the package that makes it."""
    try:
        return f"{name}{convert(file, subject, images)}"
    except ModuleNotFoundError:
        return ""
    # Converters raise errors of many classes.
    except Exception as error:
        return f"not {name}: {_reason(error)}"


def _to_coreml(file: Path, subject: Subject, images: Tensor) -> str:
    """Convert a file; what it computes then is known on Apple's machines alone."""
    import coremltools  # pyright: ignore[reportMissingImports]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = torch.export.load(str(file)).module()

        def forward(self, images: Tensor) -> Any:
            return self.run(images.to(torch.uint8))

    program = torch.export.export(Model(), (images.float(),))
    # CoreML has no other names of one tensor.
    program = program.run_decompositions({torch.ops.aten.alias.default: lambda x: x})
    coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS18)
    return ""


def _to_executorch(file: Path, subject: Subject, images: Tensor) -> str:
    """Convert a file, run it, and say how its outputs differ."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports]
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    program = torch.export.export(torch.export.load(str(file)).module(), (images,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    # A method reads the memory of both, and keeps neither.
    memory = lowered.to_executorch().buffer
    loaded = Runtime.get().load_program(memory)
    method: Any = loaded.load_method("forward")
    found = dict(zip(program.module()(images), method.execute([images]), strict=True))
    difference = compare(subject.module, lambda _: found, [images], EXACT)
    return f" ({difference})" if difference.faults else f" (within {EXACT.logits})"


def _alone(file: Path, subject: Subject, batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    images, results = file.with_name("images.pt"), file.with_name("results.pt")
    torch.save(list(batches), images)
    words = [sys.executable, "-c", ALONE, str(file), str(images), str(results)]
    subprocess.run(words, check=True)
    return torch.load(results)


def _openvino(file: Path, subject: Subject, batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    import openvino

    # By default it computes in bfloat16 where the processor can.
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(file), "CPU", precision)
    found = []
    for images in batches:
        outputs = model([images.numpy()])
        found.append({name: torch.from_numpy(outputs[name].copy()) for name in subject.outputs})
    return found


def main(
    body: Annotated[list[str] | None, typer.Argument(help="Skeletons; default: all.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    to: Annotated[list[Format] | None, typer.Option(help="Default: onnx and torch.")] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="The only height and width of the images.")
    ] = None,
) -> None:
    """Write rows of the table in docs/export.md of the checkout in the current folder."""
    order = list(bodies())

    def place(cells: list[str]) -> tuple:
        return order.index(cells[0]), TASKS.index(cells[2]), cells[3]

    for skeleton, model in bodies().items():
        if body and skeleton not in body:
            continue
        for each in task or TASKS:
            for form in to or (Format.onnx, Format.torch):
                results = by_child(results_of, model, each, form, size)
                row = [skeleton, f"`{model}`", each, form.value, *results]
                print(*row, sep="  ", flush=True)
                write_row(row, "export_table", HEAD, 4, place)


if __name__ == "__main__":
    typer.run(main)
