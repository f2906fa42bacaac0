"""Compare, step by step, the losses of two processes and of one process at twice the batch.

    python tests/detection/two_processes.py

On two GPUs through NCCL where there are two, else on the CPU through gloo. The detector is ATSS,
whose losses are divided by the mean of all processes' counts of positives (`reduce_mean` in
mmdet), so that they average exactly. RetinaNet and the two-stage detectors divide by each process's
own count, and the latter draw the regions to train on at random: their losses differ by design.
Batch normalisation is in evaluation mode, the images are of one size and nothing augments them.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

ROOT = Path(__file__).parents[2]
STEPS, TOLERANCE = 20, 1e-4


@HOOKS.register_module(force=True)
class WriteLossesHook(Hook):
    """The losses of each step, averaged over the processes, in losses.json."""

    def before_train(self, runner) -> None:
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        losses = {name: value.detach().clone() for name, value in outputs.items()}
        for value in losses.values():
            all_reduce(value, op="mean")
        self.losses.append({name: value.item() for name, value in losses.items()})

    def after_train(self, runner) -> None:
        if is_main_process():
            Path(runner.work_dir, "losses.json").write_text(json.dumps(self.losses))


def train_alone(config: Path, batch_size: int) -> list[dict[str, float]]:
    """The losses of `linsight train` in this process."""
    from linsight.tools.train import train

    words = [f"train_dataloader.batch_size={batch_size}"]
    train(str(config), words, work_dir=config.parent / "one")
    return json.loads((config.parent / "one" / "losses.json").read_text())


def train_together(config: Path, batch_size: int) -> list[dict[str, float]]:
    """The losses of `linsight train` in two processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "linsight.tools.train", str(config), "--launcher", "pytorch"]
    command += ["--work-dir", str(config.parent / "two")]
    command += [f"train_dataloader.batch_size={batch_size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return json.loads((config.parent / "two" / "losses.json").read_text())


def main(folder: Path) -> None:
    from tests.detection.conftest import write_config

    config = write_config(folder, train=16, epochs=STEPS // 4)
    text = config.read_text().replace("val_interval=1", "val_interval=99")
    hook = 'custom_hooks = [dict(type="WriteLossesHook")]\n'
    hook += 'custom_imports["imports"].append("tests.detection.two_processes")\n'
    config.write_text(text + hook)
    one, two = train_alone(config, 4), train_together(config, 2)
    if not len(one) == len(two) == STEPS:
        raise RuntimeError(f"{len(one)} and {len(two)} steps, expected {STEPS}")
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        differ = {name: (a[name], b[name]) for name in a if abs(a[name] - b[name]) > TOLERANCE}
        if differ:
            raise RuntimeError(f"step {step}: one and two processes differ: {differ}")
    largest = max(abs(a[name] - b[name]) for a, b in zip(one, two, strict=True) for name in a)
    where = "NCCL" if torch.cuda.is_available() else "gloo"
    print(
        f"{STEPS} steps, loss {one[0]['loss']:.4f} to {one[-1]['loss']:.4f}: one process and two "
        f"({where}) differ by at most {largest:.1e}"
    )


if __name__ == "__main__":
    # Another batch size runs other kernels, which differ in the fourth digit in TF32.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
