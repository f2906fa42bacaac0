"""Measurements of `linsight benchmark`: percentiles of a call's time, CUDA graphs, memory."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from linsight.backbones.graph_passes import Recorder
from linsight.kernels.runtime.dispatch import HAS_TRITON
from linsight.kernels.runtime.private import get_cache_folder

try:
    import fcntl
except ModuleNotFoundError:  # Windows has none
    fcntl = None

QUANTILES = (0.2, 0.5, 0.8)
MOST_COPIES = 64
# The inputs of a round are this many times as large as the L2 cache. What the cache holds from
# before, or has still to write back, is then at most a fortieth of what a round moves.
CACHES = 40


def quantiles(
    call: Callable[[], Any], device: torch.device, seconds: float, wait: bool = False
) -> list[float]:
    """The 20th, 50th and 80th percentile of the time of `call`, in ms.

    On CUDA `triton.testing.do_bench` measures it, and overwrites the L2 cache before each call;
    elsewhere, and with `wait`, the clock does, from a call until its result is there. `call` is
    repeated for `seconds`, or for up to ten times as long if it would run fewer than 20 times, and
    at least three times.
    """
    call()
    one = elapsed(call, device)
    seconds = max(min(max(seconds, 20 * one), 10 * seconds), 3 * one)
    if device.type == "cuda" and not wait:
        from triton.testing import do_bench

        times = do_bench(call, warmup=25, rep=round(1e3 * seconds), quantiles=QUANTILES)
        return cast(list[float], times)
    times = [1e3 * elapsed(call, device) for _ in range(max(3, int(seconds / one)))]
    return torch.tensor(times).quantile(torch.tensor(QUANTILES)).tolist()


def elapsed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds from a `call` until the device has finished its work."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device. Errors of the device are raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies(size: int, device: torch.device) -> int:
    """Number of inputs of `size` bytes per round, so that none of them is still in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, max(1, -(-CACHES * cache // size)))


def capture_graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A function that replays all `calls` as one CUDA graph; each has output memory of its own."""
    recorder = Recorder(torch.device("cuda", torch.cuda.current_device()))
    recorder.rehearse(calls[0], may_wait=True)
    # Results are kept until all calls are recorded, since the next call would reuse the memory of
    # a result that is freed.
    return recorder.record(lambda: [call() for call in calls])[0]


def peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """The largest memory of all tensors during `call`, in MiB; None without CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


@contextmanager
def take_turn(device: torch.device, alone: bool) -> Iterator[None]:
    """A context for work on a device which other benchmarks of this machine may use as well.

    Any number of them build and check at once, which is mostly the host's work; one that measures
    waits for them, and they wait for it.

    Args:
        device: the device.
        alone: whether to measure.
    """
    if fcntl is None:
        yield
        return
    name = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    path = Path(tempfile.gettempdir(), f"linsight-benchmark-{name}.lock")
    if not path.exists():
        path.touch()
    # Another user's file can be read, which is enough to lock it.
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@contextmanager
def empty_caches() -> Iterator[None]:
    """Let this process, and those that it starts, compile into empty folders."""
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder, name)) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value


def count_machine_codes() -> int:
    """How many machine codes Triton's cache has."""
    if not HAS_TRITON:
        return 0
    # Beside the files of a machine code Triton writes one that lists them.
    return sum(1 for _ in Path(get_cache_folder()).glob("*/__grp__*.json"))


def release() -> None:
    """Collect garbage, and return cached memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second, read and written, of copies between two tensors in the device's memory."""
    size = 2**30 if device.type == "cuda" else 2**26
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        for _ in range(4):
            target.copy_(source)

    return 4 * 2 * size / (1e-3 * quantiles(copy, device, seconds)[1])
