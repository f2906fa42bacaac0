"""Several processes train as one does, whole or sharded, and go on after a kill.

They run on the CPU through gloo.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings are forked")
def test_trainings_in_several_processes_end_alike(tmp_path):
    script = Path(__file__).with_name("many_processes.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all trainings end alike" in result.stdout


@pytest.mark.slow
def test_an_imagenet_recipe_on_two_processes_without_a_gpu(tmp_path):
    """torchrun alone says that there are two; the recipe's batch norms are PyTorch's."""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 255, (80, 100, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.jpg")
    changes = [
        f"data_root={tmp_path / 'data'}",
        "model.backbone.model_name=rala_vit_nano",
        "model.num_classes=2",
        "train_cfg.max_epochs=1",
        *(f"{split}_dataloader.batch_size=2" for split in ("train", "val")),
        *(f"{split}_dataloader.num_workers=0" for split in ("train", "val")),
    ]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    result = subprocess.run(
        [
            *torchrun, "--nproc-per-node=2", "-m", "linsight.tools.train",
            "rala_vit_tiny_300e_in1k", f"--work-dir={tmp_path / 'run'}", *changes,
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert output.count("sync_bn: 1 batch norms") == 1
    assert "Epoch(train) [1][2/2]" in output
    assert (tmp_path / "run" / "epoch_1.pth").is_file()
