"""Time the first calls of a process that has compiled nothing: `linsight benchmark cold`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from linsight.tools.benchmark_cases import Case, model
from linsight.tools.benchmark_measure import Model, attempt
from linsight.tools.benchmark_timing import count_machine_codes, elapsed, empty_caches, release


@dataclass(frozen=True)
class Order:
    """What a process measures, one resolution after the other."""

    name: str
    mixer: str | None
    resolutions: list[int]
    batch: int
    dtype: str
    device: str
    mode: str
    phase: str

    def cases(self) -> list[Case]:
        """The case of each resolution."""
        made = [model(self.name, side, self.batch, self.mixer) for side in self.resolutions]
        return [replace(case, kind="cold") for case in made]


class ColdStart:
    """The measurements of a fresh process whose caches are empty, by resolution."""

    def __init__(self, order: Order) -> None:
        self.case = order.cases()[0]
        with empty_caches(), tempfile.NamedTemporaryFile("r") as file:
            command = [sys.executable, "-m", __name__, json.dumps(asdict(order)), file.name]
            ended = subprocess.run(command, capture_output=True, text=True)
            self.found = dict(map(json.loads, file))
        last = (ended.stderr.strip().splitlines() or [""])[-1]
        self.fault = f"the process ended with {ended.returncode}: {last}"

    def measure(self, resolution: int) -> dict[str, Any]:
        """The values of a row.

        Raises:
            RuntimeError: the process ended before it had them.
        """
        if resolution not in self.found:
            raise RuntimeError(self.fault)
        return self.found[resolution]


class ColdModel(Model):
    """A classifier whose first two calls are timed one by one, before it is checked."""

    def prepare(self) -> None:
        self.images, self.labels = self.data(self.case.batch)
        call = self.make_call()
        before = count_machine_codes()
        first = elapsed(call, self.device)
        self.compiled = count_machine_codes() - before
        self.second = elapsed(call, self.device)
        super().prepare()
        self.first_call = first

    def measure(self, graph: bool = False) -> dict[str, Any]:
        """The seconds of the first call, and the milliseconds of the second."""
        second = 1e3 * self.second
        return self.values((None, second, None), None) | {"compiled": self.compiled}


def main() -> None:
    """Measure what the first argument says; the second names the file of the results."""
    order = Order(**json.loads(sys.argv[1]))
    device, dtype = torch.device(order.device), getattr(torch, order.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    # The device's context and the library of matrix products are there before the clock starts.
    warm = torch.ones(16, 16, dtype=dtype, device=device)
    (warm @ warm).sum().item()
    for case in order.cases():

        def measure(case: Case = case) -> dict[str, Any]:
            return ColdModel(case, dtype, device, order.mode, 0.0, order.phase).measure()

        values, fault = attempt(measure)
        with open(sys.argv[2], "a") as file:
            print(json.dumps([case.resolution, values or {"check": fault}]), file=file)
        release()


if __name__ == "__main__":
    main()
