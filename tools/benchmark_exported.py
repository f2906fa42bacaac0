"""Exported classifiers in `linsight benchmark`: ONNX Runtime, OpenVINO and AOTInductor on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from linsight.kernels import force
from linsight.tools.benchmark_measure import Model

# The packages that a mode needs, by its name.
RUNTIMES = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "aoti": (),
}


def missing(mode: str) -> list[str]:
    """Packages that a mode needs and that are not installed."""
    return [name for name in RUNTIMES[mode] if not find_spec(name)]


class ExportedModel(Model):
    """A classifier in inference, run by a runtime from a file for images of the case's size.

    Its mode is one of `RUNTIMES`.
    """

    def compile_module(self) -> Callable[[Tensor], Tensor]:
        """The function that runs the file."""
        images = torch.randn(self.case.batch, 3, *self.case.size)
        with torch.no_grad(), force("reference"):
            program = torch.export.export(self.module, (images,))
        with tempfile.TemporaryDirectory() as folder:
            if self.mode == "aoti":
                file = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(Path(folder, "model.pt2"))
                )
                return torch._inductor.aoti_load_package(file)
            file = str(Path(folder, "model.onnx"))
            torch.onnx.export(program, f=file, dynamo=True, verbose=False, input_names=["images"])
            return _open_openvino(file) if self.mode == "openvino" else _open_onnx(file)


def _open_onnx(file: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _open_openvino(file: str) -> Callable[[Tensor], Tensor]:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = openvino.Core().compile_model(file, "CPU", settings)
    return lambda images: torch.from_numpy(model([images.numpy()])[0].copy())
