"""Measure how training scales: `python -m linsight.tools.benchmark_scaling MODEL`.

One row per number of GPUs, on synthetic images: DistributedDataParallel, synchronised batch norms,
bfloat16 and fused AdamW, as in `linsight train` with the ImageNet recipes, without its data. Needs
no mmengine. Without a GPU it runs on processors, through gloo.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import timm
import torch
import typer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import linsight
from linsight.backbones.layers import synchronize_batch_norms
from linsight.tools.benchmark_timing import synchronize

MODES = ("eager", "captured", "compile")
# PyTorch records its own CUDA graphs, and fills its caches, in the first steps.
WARM_UP = 12


@dataclass(frozen=True)
class Setting:
    """What every number of GPUs is measured with."""

    model: str
    batch: int
    resolution: int
    bucket_mib: float
    seconds: float


def build_step(
    setting: Setting, mode: str, device: torch.device, processes: int
) -> tuple[Any, nn.Module]:
    """A function that takes one training step on synthetic images, and the model."""
    torch.manual_seed(0)
    # The name that replaces it is not in torch 2.11.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    classes = 1000
    model: nn.Module = timm.create_model(setting.model, num_classes=classes, drop_path_rate=0.1)
    model = model.to(device).train()
    if processes > 1:
        model = synchronize_batch_norms(model) if device.type == "cuda" else model
    if mode == "captured":
        model = linsight.capture_training(model)
    elif mode == "compile":
        model.compile()
    if processes > 1:
        # The options of SafeRunner (heads/runner.py), which needs mmengine.
        model = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=setting.bucket_mib,
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = (setting.batch, 3, setting.resolution, setting.resolution)
    images = torch.randn(size, device=device)
    labels = torch.randint(classes, (setting.batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def measure(rank: int, processes: int, port: int, mode: str, setting: Setting, rates: Any) -> None:
    """Train in one of several processes; the first puts images/s and peak memory into `rates`."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if processes > 1:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://localhost:{port}",
            rank=rank,
            world_size=processes,
        )
    step, model = build_step(setting, mode, device, processes)
    for _ in range(WARM_UP):
        step()
    elapsed = time_steps(step, 5, device, processes)
    steps = max(5, round(setting.seconds / (elapsed / 5)))
    # The fastest of three counts, since other work of the machine only slows a step down.
    elapsed = min(time_steps(step, steps, device, processes) for _ in range(3))
    if rank == 0:
        cuda = device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else 0.0
        rates.put((processes * setting.batch * steps / elapsed, memory))
    if processes > 1:
        linsight.release_graphs(model)
        torch.distributed.destroy_process_group()


def time_steps(step: Any, steps: int, device: torch.device, processes: int) -> float:
    """Seconds that the slowest process takes for some steps."""
    synchronize(device)
    if processes > 1:
        torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    if processes > 1:
        torch.distributed.all_reduce(elapsed, op=torch.distributed.ReduceOp.MAX)
    return elapsed.item()


def scaling(
    model: Annotated[str, typer.Argument(help="A model of timm or linsight.")] = "rala_vit_small",
    counts: Annotated[str, typer.Option(help="Numbers of GPUs.")] = "1,2,4",
    modes: Annotated[str, typer.Option(help=f"Of {', '.join(MODES)}.")] = "eager",
    batch: Annotated[int, typer.Option(min=1, help="Images per GPU.")] = 128,
    resolution: Annotated[int, typer.Option(min=1, help="Side of the images.")] = 224,
    bucket_mib: Annotated[float, typer.Option(help="Gradients that are reduced at once.")] = 25,
    seconds: Annotated[float, typer.Option(help="Duration of a count; there are three.")] = 5,
) -> None:
    """Print training images/s of 1, 2, 4, ... GPUs, and what part it is of as many times one."""
    setting = Setting(model, batch, resolution, bucket_mib, seconds)
    unknown = set(modes.split(",")) - set(MODES)
    if unknown:
        raise typer.BadParameter(f"--modes has {', '.join(unknown)}, expected {', '.join(MODES)}")
    numbers = counts.split(",")
    if not all(number.strip().isdecimal() and int(number) for number in numbers):
        raise typer.BadParameter(f"--counts is {counts!r}, expected numbers of GPUs such as 1,2,4")
    if not timm.is_model(model):
        raise typer.BadParameter(f"timm has no model {model!r}")
    if "captured" in modes.split(",") and not torch.cuda.is_available():
        raise typer.BadParameter("--modes captured needs a GPU, and there is none")
    present = torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{model}, {resolution} px, batch {batch} per GPU, {name}, torch {torch.__version__}")
    print(f"{'mode':8} {'GPUs':>4} {'images/s':>10} {'scaling':>8} {'peak MiB':>9}")
    spawn = torch.multiprocessing.get_context("spawn")
    for mode in modes.split(","):
        one = None
        for processes in map(int, numbers):
            if processes > present:
                print(f"{mode:8} {processes:4} only {present} here")
                continue
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            rates = spawn.Queue()
            torch.multiprocessing.spawn(
                measure, (processes, port, mode, setting, rates), nprocs=processes
            )
            rate, memory = rates.get()
            one = one or rate / processes
            share = f"{rate / processes / one:8.1%}"
            print(f"{mode:8} {processes:4} {rate:10,.0f} {share} {memory:9,.0f}", flush=True)


if __name__ == "__main__":
    typer.run(scaling)
