"""Print versions, devices and kernels: `linsight info`."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import linsight
from linsight.kernels.runtime import dispatch

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


def info() -> None:
    """Versions, devices, and which kernels the operators run on: what a bug report needs."""
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
