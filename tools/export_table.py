"""Export one model of each body for each task, and write the table of docs/export.md.

``python -m linsight.tools.export_table [BODY...]`` takes hours on a CPU for all bodies. The weights
are random, as the question is whether a graph computes what the model computes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

import linsight.heads.segmentation  # noqa: F401  registers what configs name
from linsight.backbones import ZOO
from linsight.backbones.checkpoint import CheckpointError
from linsight.tools.config import load_config
from linsight.tools.export import Format, write_file
from linsight.tools.export_check import EXACT, compare
from linsight.tools.export_subject import (
    Subject,
    batches_for,
    classifier_subject,
    dense_subject,
)
from linsight.tools.model import Run
from linsight.tools.models import read_counts

BEGIN, END = (
    f"<!-- The lines {where} here are written by `python -m linsight.tools.export_table`. -->"
    for where in ("from", "up to")
)
CONFIGS = {
    "UPerNet": "upernet_rala_vit_nano_digits",
    "RetinaNet": "retinanet_rala_vit_nano_fpn_digits",
    "Mask R-CNN": "mask_rcnn_rala_vit_nano_fpn_digits",
    "DINO": "dino_4scale_rala_vit_nano_digits",
}
# Runs a .pt2 where linsight cannot be imported, and says what it gives.
ALONE = """
import sys
sys.modules["linsight"] = None
import torch, torchvision
file, images, results = sys.argv[1:]
run = torch.export.load(file).module()
torch.save([run(x) for x in torch.load(images)], results)
"""


def bodies() -> list[str]:
    """The smallest model of each skeleton."""
    parameters = {name: counts[0] for name, counts in read_counts().items()}
    names: dict[type, str] = {}
    for name in sorted(ZOO, key=parameters.__getitem__):
        names.setdefault(ZOO[name].family.skeleton, name)
    return sorted(names.values())


def subject_of(body: str, task: str, onnx: bool) -> Subject:
    """A model of random weights."""
    torch.manual_seed(0)
    if task == "classification":
        return classifier_subject(timm.create_model(body).eval())
    config: Config = load_config(CONFIGS[task], [f"model.backbone.model_name={body}"])
    with DefaultScope.overwrite_default_scope(config.get("default_scope", "mmengine")):
        state = MODELS.build(config.model).state_dict()
    return dense_subject(Run(config, None, state), body, onnx)


def rows(body: str, task: str) -> Iterator[tuple[str, ...]]:
    """Of each form its row: body, task, form, run by, sizes, what differs."""
    for to in (Format.onnx, Format.torch, Format.aoti):
        with tempfile.TemporaryDirectory() as folder:
            try:
                subject = subject_of(body, task, to is Format.onnx)
                written = write_file(subject, Path(folder), to)
            except (CheckpointError, ValueError) as error:
                yield body, task, to.value, "", "", str(error)
                continue
            sizes = "any" if written.size is None else "{} x {}".format(*written.size)
            row = (body, task, to.value)
            batches = batches_for(subject, written.size is None)
            used = "ONNX Runtime" if to is Format.onnx else "PyTorch"
            yield *row, used, sizes, str(written.difference)
            if to is Format.torch:
                used, found = "PyTorch without linsight", _alone(written.path, batches)
            elif to is Format.onnx and find_spec("openvino"):
                used, found = "OpenVINO", _openvino(written.path, subject, batches)
            else:
                continue
            results = iter(found)
            difference = compare(
                subject.module, lambda _, results=results: next(results), batches, EXACT
            )
            yield *row, used, sizes, "; ".join(difference.faults) or str(difference)


def _alone(file: Path, batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    images, results = file.with_name("images.pt"), file.with_name("results.pt")
    torch.save(list(batches), images)
    subprocess.run([sys.executable, "-c", ALONE, str(file), str(images), str(results)], check=True)
    return torch.load(results)


def _openvino(file: Path, subject: Subject, batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    import openvino

    model = openvino.Core().compile_model(str(file), "CPU")
    found = []
    for images in batches:
        outputs = model([images.numpy()])
        found.append({name: torch.from_numpy(outputs[name].copy()) for name in subject.outputs})
    return found


def main() -> None:
    """Write the table into docs/export.md of the checkout in the current folder."""
    page = Path("docs", "export.md")
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = ["| body | task | form | run by | sizes | differs from the model |", "| --- " * 6 + "|"]
    for body in sys.argv[1:] or bodies():
        for task in ("classification", *CONFIGS):
            for row in rows(body, task):
                print(*row, sep="  ", flush=True)
                lines.append(f"| {' | '.join(row)} |")
    page.write_text(before + "\n".join((BEGIN, "", *lines, "", END)) + after)


if __name__ == "__main__":
    main()
