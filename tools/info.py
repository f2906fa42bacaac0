"""Print what runs here: `linsight info`, or what a model runs: `linsight info MODEL`."""

import ast
import difflib
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Annotated, Any

import timm
import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import linsight
from linsight.kernels.runtime import dispatch
from linsight.tools.kernel_use import Use, record_kernel_use

EXTRAS = {
    "train": (
        "mmengine",
        "cv2",
        "sklearn",
        "pycocotools",
        "torchmetrics",
        "matplotlib",
        "tensorboard",
    ),
    "det": ("mmcv", "mmdet"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}


def info(
    model: Annotated[str | None, typer.Argument(help="A model, such as rala_vit_nano.")] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Its arguments: norm_layer=rmsnorm ..."),
    ] = None,
) -> None:
    """Versions, devices, and which kernels the operators run on: what a bug report needs.

    Of a model: which of its layers run on linsight's kernels on a GPU, and which in PyTorch.
    """
    if model is None:
        _print_installation()
        return
    try:
        _print_layers(model, dict(map(parse_argument, arguments or ())))
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _print_installation() -> None:
    table = Table(show_header=False)
    table.add_row("linsight", linsight.__version__)
    # This reads the metadata of every installed package, so it is called once.
    owners = packages_distributions()
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("torch", "torchvision", "timm", "triton"):
        table.add_row(name, _version(name, owners) or "not installed")
    for extra, modules in EXTRAS.items():
        versions = {name: _version(name, owners) for name in modules}
        found = [f"{name} {found}" for name, found in versions.items() if found]
        missing = [name for name, found in versions.items() if not found]
        lines = [", ".join(found)] * bool(found) + [f"without {', '.join(missing)}"] * bool(missing)
        table.add_row(escape(f"linsight[{extra}]"), "\n".join(lines))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(devices) or "none")
    table.add_row("operators run", _operators(bool(devices)))
    Console().print(table)


def parse_argument(word: str) -> tuple[str, Any]:
    """A model's argument and its value, from KEY=VALUE.

    Raises:
        ValueError: if it is something else.
    """
    key, mark, value = word.partition("=")
    if not (key and mark):
        raise ValueError(f"argument is {word!r}, expected KEY=VALUE such as norm_layer=rmsnorm")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value  # a word, such as the name of a norm


def _print_layers(name: str, arguments: dict[str, Any]) -> None:
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; the nearest models are {', '.join(near)}" if near else ""
        raise ValueError(f"{name!r} is no model of timm{hint}")
    if not dispatch.HAS_TRITON:
        raise RuntimeError("Triton is not installed: all layers run in PyTorch")
    model, uses = record_kernel_use(name, **arguments)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="One image in inference, on a GPU, in 32 or 16 bits. (eager): the kernels run in "
        "eager calls; torch.compile fuses the same layers itself. Layers that do nothing in "
        "inference are left out.",
        caption_justify="left",
    )
    for heading in ("layer", "how many", "runs on", "what PyTorch computes"):
        table.add_column(heading, justify="right" if heading == "how many" else "left")
    for (layer, kernels, rest), count in _count_layers(model, uses).items():
        table.add_row(layer, str(count), kernels or "PyTorch", rest)
    Console().print(table)


def _count_layers(model: nn.Module, uses: Mapping[str, Use]) -> dict[tuple[str, str, str], int]:
    """How many modules there are of a class, that run some operators, and in PyTorch the rest.

    Modules that contain others count if operators, attention or convolutions run in them besides.
    """
    counts: dict[tuple[str, str, str], int] = {}
    for name, use in uses.items():
        module = model.get_submodule(name)
        is_leaf = not any(module.children()) and not isinstance(module, nn.Dropout)
        if not (is_leaf or use.operators or use.heavy):
            continue
        kernels = ", ".join(op + " (eager)" * (op in use.eager) for op in use.operators)
        rest = ", ".join(use.heavy) if use.heavy else "" if use.operators else _reason(module)
        key = _class_name(module), kernels, rest
        counts[key] = counts.get(key, 0) + 1
    # The layers that kernels serve come first.
    return dict(sorted(counts.items(), key=lambda item: (not item[0][1], item[0])))


def _class_name(module: nn.Module) -> str:
    """The class of a module, with 'nn' or 'timm' before it where it is not linsight's."""
    origin, kind = type(module).__module__, type(module).__name__
    if origin.startswith("torch.nn."):
        return f"nn.{kind}"
    return f"timm.{kind}" if origin.startswith("timm.") else kind


def _reason(module: nn.Module) -> str:
    """What a layer is that no kernel serves."""
    if isinstance(module, nn.Linear):
        return "matrix products"
    kind = f"{type(module).__module__}.{type(module).__name__}".lower()
    if "norm" in kind:
        return "a norm that the kernels do not know"
    if "activation" in kind:
        return "an activation that is a module"
    return "all of it"


def _operators(gpu: bool) -> str:
    return "Triton kernels" if gpu and dispatch.HAS_TRITON else "the PyTorch reference"


def _version(module: str, owners: Mapping[str, list[str]]) -> str | None:
    """Version of the distribution that a module comes from; its name is added where it differs,
    as for forks."""
    names = owners.get(module, [module])
    try:
        return version(names[0]) + (f" ({names[0]})" if names[0] != module else "")
    except PackageNotFoundError:
        return None
