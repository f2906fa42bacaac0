"""A training of seconds: coloured squares in an image folder, and timm's smallest model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Where several processes share few cores, threads that wait for each other are slower than one.
torch.set_num_threads(1)

CONFIGS = Path(__file__).parents[2] / "configs"

CONFIG = """
_base_ = "{base}"
model = dict(
    type="ImageClassifier",
    backbone=dict(model_name="test_resnet", drop_path_rate=0.1),
    num_classes=3,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
    label_smoothing=0.1,
)
train_dataloader = dict(
    batch_size=4,
    num_workers={workers},
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="TimmDataset",
        root="{root}",
        split="train",
        transform=dict(
            input_size=32, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25
        ),
        augment_on_device=True,
    ),
)
val_dataloader = dict(
    batch_size=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="TimmDataset", root="{root}", split="val", transform=dict(input_size=32)
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
optim_wrapper = dict(
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(opt="adamw", lr=1e-3, weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=2, begin=1, end=3, convert_to_iter_based=True),
]
default_hooks = dict(
    ema=dict(type="EMAHook", momentum=0.1, update_buffers=True),
    checkpoint=dict(max_keep_ckpts=1),
)
train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=1)
val_cfg = dict()
test_cfg = dict()
"""


def write_images(root: Path, classes: int = 3, images: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for index in range(images):
                picture = rng.integers(0, 60, (40, 40, 3), dtype=np.uint8)
                picture[..., label % 3] += 150
                Image.fromarray(picture).save(folder / f"{index}.png")
    return root


def write_config(folder: Path, workers: int = 0) -> Path:
    path = folder / "tiny.py"
    base = CONFIGS / "_base_" / "default_runtime.py"
    path.write_text(CONFIG.format(base=base, root=folder / "images", workers=workers))
    return path


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """The operating system lets no file grow beyond `most` bytes, like a disk that is full then."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def tiny(tmp_path):
    """The path of a config that trains in seconds."""
    write_images(tmp_path / "images")
    return write_config(tmp_path)
