"""Compare, step by step, distributed training with and without graphs.

    torchrun --nproc-per-node 2 tests/backbones/graphs_two_processes.py [--sync] [--after]

On GPUs through NCCL; without them on the CPU through gloo, where a stand-in replays.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import linsight
from linsight.backbones import graphs
from linsight.backbones.layers import synchronize_batch_norms
from linsight.kernels.runtime.private import get_call

STEPS = 6
GPU = torch.cuda.is_available()


def train(graph: bool, sync: bool, after: bool, rank: int) -> list[torch.Tensor]:
    """The losses, the gradients of the last step and the weights."""
    torch.manual_seed(0)
    device = torch.device("cuda", rank) if GPU else torch.device("cpu")
    model = timm.create_model("rala_vit_nano", num_classes=10, drop_path_rate=0.1).to(device)
    if sync:
        synchronize_batch_norms(model)
    module = model
    if graph and not after:
        linsight.capture_training(model)
    model = DistributedDataParallel(
        model,
        device_ids=[rank] if GPU else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=not sync,
    )
    if graph and after:
        linsight.capture_training(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(rank)
    losses = []
    for i in range(STEPS):
        for accumulating in (True, False) if sync else (False,):
            generator = torch.Generator().manual_seed(10 * i + rank + 5 * accumulating)
            x = torch.randn(4, 3, 64, 64, generator=generator).to(device)
            labels = torch.randint(10, (4,), generator=generator).to(device)
            with model.no_sync() if accumulating else nullcontext():
                loss = F.cross_entropy(model(x), labels)
                loss.backward()
            losses.append(loss.detach())
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    if graph and not (sync and not GPU):
        (recorded,) = get_call(module).training.passes.values()
        assert recorded.replays == len(losses) - 1, recorded.replays
    linsight.release_graphs(model)
    return [*losses, *gradients, *model.state_dict().values()]


def main() -> None:
    dist.init_process_group("nccl" if GPU else "gloo")
    rank = int(os.environ["LOCAL_RANK"])
    if GPU:
        torch.cuda.set_device(rank)
        torch.backends.cudnn.deterministic = True
    else:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from tests.backbones.graph_stand import Stand

        graphs._Graphs.make_recorder = Stand
    sync, after = "--sync" in sys.argv, "--after" in sys.argv
    eager, graphed = (train(graph, sync, after, rank) for graph in (False, True))
    bound = 2e-2 if GPU else 0.0
    assert len(eager) == len(graphed)
    for a, b in zip(eager, graphed, strict=True):
        far = (a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-3)
        assert far <= bound, (far, a.shape)
    if rank == 0:
        print("the same")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
