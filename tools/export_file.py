"""Run an exported file back: ONNX in ONNX Runtime, .pt2 in PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of eight bits
import torchvision  # noqa: F401  registers the operators of detectors
from torch import Tensor

from linsight.backbones.checkpoint import CheckpointError

DESCRIPTION = "linsight.json"
SUFFIXES = (".onnx", ".pt2")


@dataclass(frozen=True)
class ExportedFile:
    """An exported model that can be run.

    Attributes:
        run: gives tensors by name, of uint8 images (B, 3, H, W).
        description: what the file says of its model.
        sides: its images' (height, width), each None where any is possible.
    """

    run: Callable[[Tensor], dict[str, Tensor]]
    description: dict[str, Any]
    sides: tuple[int | None, int | None]


def is_exported_file(source: str | Path) -> bool:
    path = Path(source)
    return path.suffix in SUFFIXES and path.is_file()


# Loads a package, with the file's name as the first argument.
_LOAD = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"


def check_package(path: Path) -> None:
    """Load a package in another process, which its machine code may end without an exception.

    Raises:
        CheckpointError: the process did not end well.
    """
    words = [sys.executable, "-c", _LOAD, str(path)]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [""])[-1]
        why, remedy = last, ""
        if run.returncode < 0:
            # A compiler that links another C++ library than PyTorch's makes such packages.
            compiler = os.environ.get("CXX", "g++")
            why = f"signal {-run.returncode}"
            remedy = f"set CXX, which is {compiler}, to another C++ compiler, or "
        raise CheckpointError(
            f"the package was built, but cannot be loaded here ({why}): {remedy}--to torch writes "
            "a file that PyTorch runs"
        )


def open_file(path: str | Path) -> ExportedFile:
    """Open a file that `linsight export` has written. A package of AOTInductor is machine code,
    which is run: open such of your own alone.

    Raises:
        CheckpointError: the file is damaged, or not one of linsight's, or its runtime is missing.
    """
    path = Path(path)
    try:
        opened = _open_onnx(path) if path.suffix == ".onnx" else _open_archive(path)
    except CheckpointError:
        raise
    # The runtimes raise errors of many classes, depending on where the fault is.
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be opened: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    if not {"task", "classes", "preparation", "smallest_side"} <= opened.description.keys():
        raise CheckpointError(f"{path} has no description of linsight export: export it again")
    return opened


def _open_onnx(path: Path) -> ExportedFile:
    if not find_spec("onnxruntime"):
        raise CheckpointError(f"{path} needs onnxruntime: pip install 'linsight[export]'")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        found = session.run(None, {"images": images.cpu().numpy()})
        return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}

    description = _description(session.get_modelmeta().custom_metadata_map)
    return ExportedFile(run, description, _sides(description))


def _open_archive(path: Path) -> ExportedFile:
    with zipfile.ZipFile(path) as archive:
        compiled = any("/aotinductor/" in name for name in archive.namelist())
    if compiled:
        # A package computes anything of an input of another shape or dtype, unless this is set.
        os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
        package = torch._inductor.aoti_load_package(str(path))
        description = json.loads(package.get_metadata().get(DESCRIPTION, "{}"))
        if batch := description.get("batch"):
            return ExportedFile(
                _by_batches(package, batch, description["device"]), description, _sides(description)
            )
        return ExportedFile(package, description, _sides(description))
    extra = {DESCRIPTION: ""}
    program = torch.export.load(str(path), extra_files=extra)
    description = json.loads(extra[DESCRIPTION] or "{}")
    return ExportedFile(program.module(), description, _sides(description))


def _by_batches(run: Callable, batch: int, device: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """Give a program that takes `batch` images on a device any number of them on the CPU."""

    def run_all(images: Tensor) -> dict[str, Tensor]:
        found = []
        for part in images.split(batch):
            # The last image stands for those that lack.
            whole = torch.cat([part, part[-1:].expand(batch - len(part), -1, -1, -1)])
            outputs = run(whole.to(device))
            found.append({name: x[: len(part)].cpu() for name, x in outputs.items()})
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    return run_all


def _sides(description: dict[str, Any]) -> tuple[int | None, int | None]:
    height, width = description.get("image_size") or (None, None)
    return height, width


def _description(entries: dict[str, str]) -> dict[str, Any]:
    if "task" not in entries:
        return {}
    words = ("linsight_version", "task", "backbone", "dtype")
    return {key: text if key in words else json.loads(text) for key, text in entries.items()}
