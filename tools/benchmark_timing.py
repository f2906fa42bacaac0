"""How `linsight benchmark` takes times: percentiles of a call, graphs, copies, memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

QUANTILES = (0.2, 0.5, 0.8)
MOST_COPIES = 64
# How many times the L2 cache the inputs of a round fill: what a round finds there, or leaves
# to be written back, is then a fortieth of what it moves.
CACHES = 40


def quantiles(call: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """The 20th, 50th and 80th percentile of the time of `call`, in ms.

    By `triton.testing.do_bench` on CUDA, the L2 cache overwritten before each call; by the clock
    elsewhere. `call` is repeated for `seconds`, longer if it would run fewer than 20 times, at
    most ten times as long, and three times at least.
    """
    call()
    one = elapsed(call, device)
    seconds = max(min(max(seconds, 20 * one), 10 * seconds), 3 * one)
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=25, rep=1e3 * seconds, quantiles=QUANTILES)
    times = [1e3 * elapsed(call, device) for _ in range(max(3, int(seconds / one)))]
    return torch.tensor(times).quantile(torch.tensor(QUANTILES)).tolist()


def elapsed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done what one `call` asks of it."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device; raises what went wrong there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies(size: int, device: torch.device) -> int:
    """How many inputs of `size` bytes a round takes so that none is found in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, max(1, -(-CACHES * cache // size)))


def captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that replays all `calls` as a CUDA graph; each writes to memory of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until all are captured: memory given back would be written by the next call too.
        results = [call() for call in calls]
    del results
    return graph.replay


def peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory that tensors held during `call`, in MiB, with all that stood before it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def release() -> None:
    """Give back the memory of what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes a second, read and written, of copies between two tensors of the device's memory."""
    size = 2**30 if device.type == "cuda" else 2**26
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        for _ in range(4):
            target.copy_(source)

    return 4 * 2 * size / (1e-3 * quantiles(copy, device, seconds)[1])
