"""Trainings in several processes on the CPU (gloo), compared with each other and with one process.

A process of its own, because it forks the trainings from a state in which torch has run nothing.
Run as ``python many_processes.py FOLDER``; tests/tools/test_many_processes.py runs it.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import yapf.yapflib.yapf_api
from mmengine.dist import all_reduce, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from linsight.data.digits import load_split
from linsight.heads.checkpoint import read_checkpoint
from linsight.tools.config import load_config
from linsight.tools.model import open_model
from linsight.tools.test import test
from linsight.tools.train import train

# mmengine formats the config for every checkpoint, which takes longer than these trainings.
yapf.yapflib.yapf_api.FormatCode = lambda code, **style: (code, True)

CONFIGS = Path(__file__).parents[2] / "configs"

# The optimiser's epsilon bounds what rounding makes of a gradient that is nearly zero.
CONFIG = f"""
_base_ = "{CONFIGS}/ravlt/rala_vit_nano_digits.py"
model = dict(
    backbone=dict(
        model_name="softmax_deit_tiny", img_size=64, embed_dim=48, depth=2, num_heads=3
    ),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True, _delete_=True),
    dataset=dict(length=24),
)
val_dataloader = dict(batch_size=4, num_workers=0, dataset=dict(length=8))
test_dataloader = val_dataloader
optim_wrapper = dict(
    optimizer=dict(opt="adamw", lr=1e-3, eps=1e-3, weight_decay=0.05, fused=True, _delete_=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = dict(
    type="CosineAnnealingLR", T_max=2, convert_to_iter_based=True, _delete_=True
)
train_cfg = dict(max_epochs=2, val_interval=2)
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=-1),
    learning_curve=None,
    predictions=None,
    logger=dict(interval=1),
)
custom_hooks = [
    dict(type="StepsHook"),
    dict(type="KillOnceHook"),
    dict(type="EMAHook", ema_type="FusedExponentialMovingAverage", momentum=0.1),
]
"""


@HOOKS.register_module(force=True)
class StepsHook(Hook):
    """Loss, averaged over the processes, and norm of the gradient of each step, in steps.json."""

    def before_train(self, runner) -> None:
        self.steps = []
        wrapper = runner.model
        if isinstance(wrapper, DistributedDataParallel) and not wrapper.gradient_as_bucket_view:
            raise RuntimeError("gradients are copied into buckets")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        loss = outputs["loss"].detach().clone()
        all_reduce(loss, op="mean")
        norm = MessageHub.get_current_instance().get_scalar("train/grad_norm").current()
        self.steps.append((loss.item(), norm))

    def after_train(self, runner) -> None:
        if is_main_process():
            Path(runner.work_dir, "steps.json").write_text(json.dumps(self.steps))


@HOOKS.register_module(force=True)
class KillOnceHook(Hook):
    """Under torchrun, kill the second process in the second epoch, but only the first time."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and get_rank() == 1 and runner.epoch == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def work(call: Callable[[], None], log: str) -> None:
    """Run `call` in a forked process whose output goes to the file `log`."""
    file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_RDWR)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    call()


def run(processes: int, name: str, call: Callable[[], None]) -> None:
    """Run `call` in forked processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(processes):
        log = f"{name}.{rank}.log"
        pid = os.fork()
        if pid:
            children[pid] = log
            continue
        status = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
            work(call, log)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if any(codes):
        logs = "".join(Path(log).read_text()[-3000:] for log in children.values())
        raise RuntimeError(f"{name}: exit codes {codes}\n{logs}")


def train_in(folder: Path, name: str, processes: int, *words: str, resume: str = "") -> list:
    """The steps of a training in `folder`/`name`, by one process without a launcher if it is 0."""
    launcher = "pytorch" if processes else "none"
    overrides = [*words, *([resume] if resume else [])]

    def call() -> None:
        train(
            str(folder / "config.py"),
            overrides,
            work_dir=folder / name,
            launcher=launcher,
            resume=bool(resume),
        )

    start = time.monotonic()
    run(max(processes, 1), str(folder / name), call)
    print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    return json.loads((folder / name / "steps.json").read_text())


def compare(what: str, found: list, wanted: list, tolerance: float) -> None:
    """Raise RuntimeError unless the losses and norms of the steps agree."""
    if len(found) != len(wanted):
        raise RuntimeError(f"{what}: {len(found)} steps, expected {len(wanted)}")
    error = (torch.tensor(found) - torch.tensor(wanted)).abs().max().item()
    if not error <= tolerance:
        raise RuntimeError(f"{what}: steps differ by {error}: {found}, expected {wanted}")


def compare_weights(what: str, found: Path, wanted: Path, tolerance: float) -> None:
    """Raise RuntimeError unless two checkpoints hold the same weights and averages."""
    found, wanted = read_checkpoint(found), read_checkpoint(wanted)
    for part in ("state_dict", "ema_state_dict"):
        if found[part].keys() != wanted[part].keys():
            raise RuntimeError(f"{what}: names in {part} differ")
        for name, value in wanted[part].items():
            error = (found[part][name].double() - value.double()).abs().max().item()
            if not error <= tolerance:
                raise RuntimeError(f"{what}: {part} {name} differs by {error}")


def main(folder: Path) -> None:
    config = folder / "config.py"
    config.write_text(CONFIG)
    load_config(config)  # Once for all trainings: it imports what the config names.
    load_split("train")
    sharded = "model_wrapper_cfg.type=FullyShardedModel"
    twice = "train_dataloader.batch_size=8"

    one = train_in(folder, "one", 0, twice)
    two = train_in(folder, "two", 2)
    compare("two processes and one", two, one, 1e-5)
    compare_weights(
        "two processes and one", folder / "two/epoch_2.pth", folder / "one/epoch_2.pth", 1e-6
    )

    shards = train_in(folder, "shards", 2, sharded)
    compare("sharded and not", shards, two, 1e-5)
    compare_weights(
        "sharded and not", folder / "shards/epoch_2.pth", folder / "two/epoch_2.pth", 1e-6
    )

    half = str(folder / "shards/epoch_1.pth")
    if len(list(Path(half).glob("*.distcp"))) != 2:
        raise RuntimeError(f"{half} has no shards of two processes")
    for name, processes, words in (
        ("on one process", 1, [sharded, twice]),
        ("without shards", 0, [twice]),
    ):
        resumed = train_in(folder, name, processes, *words, resume=half)
        compare(f"resumed {name}", resumed, one[3:], 1e-5)
        last = folder / name / "epoch_2.pth"
        compare_weights(f"resumed {name}", last, folder / "one/epoch_2.pth", 1e-6)
    whole = str(folder / "two/epoch_1.pth")
    resumed = train_in(folder, "from whole", 2, sharded, resume=whole)
    compare("resumed from whole weights", resumed, two[3:], 1e-5)

    def evaluate() -> None:
        checkpoint = folder / "shards/epoch_2.pth"
        test(str(config), str(checkpoint), work_dir=folder / "test")
        read = open_model(checkpoint).state_dict()
        for name, value in read_checkpoint(checkpoint)["state_dict"].items():
            if not torch.equal(read[name.removeprefix("backbone.")], value):
                raise RuntimeError(f"a model opened from {checkpoint} has another {name}")

    run(1, str(folder / "test"), evaluate)

    # The agent of torchrun, which forks instead of starting Python anew. Unless told so, it keeps
    # the addresses of the processes that have ended, and those that follow may read them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=3,
        start_method="fork",
        monitor_interval=0.1,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="drill",
    )
    # Another training's checkpoint, which the restarted one must not take for its own.
    killed = folder / "killed"
    killed.mkdir()
    (killed / "last_checkpoint").write_text(str(folder / "one/epoch_2.pth"))
    start = time.monotonic()
    elastic_launch(launch, work)(
        lambda: train(str(config), [], work_dir=killed, launcher="pytorch"), f"{killed}.log"
    )
    print(f"killed: {time.monotonic() - start:.1f} s", flush=True)
    log = Path(f"{killed}.log").read_text()
    if "resumed epoch: 1, iter: 3" not in log:
        raise RuntimeError(f"the killed training did not resume: {log[-3000:]}")
    compare_weights("killed", killed / "epoch_2.pth", folder / "two/epoch_2.pth", 0.0)
    print("all trainings end alike")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
