"""Trainings in several processes on the CPU (gloo), compared with each other and with one process.

A process of its own, because it forks the trainings from a state in which torch has run nothing.
Run as ``python many_processes.py FOLDER``; tests/tools/test_many_processes.py runs it.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import mmengine.config.config
import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS

from linsight.heads.checkpoint import read_checkpoint
from linsight.tools.config import load_config
from linsight.tools.test import test
from linsight.tools.train import train

# mmengine formats the config for every checkpoint, which takes longer than these trainings.
mmengine.config.config.FormatCode = lambda code, **style: (code, True)

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
    optimizer=dict(opt="adamw", lr=1e-3, eps=1e-3, weight_decay=0.05, _delete_=True),
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
    dict(type="EMAHook", ema_type="FusedExponentialMovingAverage", momentum=0.1),
]
"""


@HOOKS.register_module(force=True)
class StepsHook(Hook):
    """Loss, averaged over the processes, and norm of the gradient of each step, in steps.json."""

    def before_train(self, runner) -> None:
        self.steps = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        loss = outputs["loss"].detach().clone()
        all_reduce(loss, op="mean")
        norm = MessageHub.get_current_instance().get_scalar("train/grad_norm").current()
        self.steps.append((loss.item(), norm))

    def after_train(self, runner) -> None:
        if is_main_process():
            Path(runner.work_dir, "steps.json").write_text(json.dumps(self.steps))


def run(processes: int, work_dir: Path, call) -> list[tuple[float, float]]:
    """The steps of trainings that `call(launcher)` starts in forked processes, which it joins."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = "pytorch" if processes else "none"
    children = []
    for rank in range(max(processes, 1)):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        status = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
            log = os.open(f"{work_dir}.{rank}.log", os.O_CREAT | os.O_APPEND | os.O_RDWR)
            os.dup2(log, 1)
            os.dup2(log, 2)
            torch.set_num_threads(1)
            call(launcher)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    logs = "".join(Path(f"{work_dir}.{r}.log").read_text()[-3000:] for r in range(len(children)))
    assert not any(codes), f"exit codes {codes}\n{logs}"
    return json.loads((work_dir / "steps.json").read_text())
