"""Count the parameters and the operations of models, and read the counts that are kept."""

from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from linsight.backbones import zoo
from linsight.backbones.initialization import shapes_only
from linsight.kernels import force
from linsight_command.lists import read_zoo

# A row of every model for `linsight models`, written by `python -m linsight.tools.zoo`.
COUNTS = Path(zoo.__file__).with_name("counts.csv")


def read_counts() -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of the models that `COUNTS` lists."""
    return {row["model"]: (int(row["parameters"]), int(row["multiply_adds"])) for row in read_zoo()}


def count(name: str, size: int = 224) -> tuple[int, int]:
    """Parameters, and multiply-adds of convolutions and matrix products, for one square image."""
    with torch.device("meta"), force("reference"), torch.inference_mode():
        # Parameters that require a gradient would make the counter look for the modules that
        # each tensor comes from.
        with shapes_only():
            model = timm.create_model(name).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
