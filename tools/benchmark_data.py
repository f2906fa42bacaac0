"""How many images a data worker feeds, and what their augmentation costs the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from mmengine.registry import DATASETS
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import default_collate

from linsight.heads.classification import LabelledImages
from linsight.tools.benchmark_timing import synchronize
from linsight.tools.config import ConfigError, load_config

_LEAST = 3  # batches per measurement


def measure_data(
    name: str, device: torch.device, batch: int | None, seconds: float
) -> Iterator[str]:
    """One line for timm's transform in the workers, and one with ``augment_on_device``.

    The images are 64 JPEGs of 500 x 375 pixels and quality 90, crops of scikit-learn's two
    photographs. A worker's time is the processor time of one process that reads, transforms and
    stacks batches.

    Args:
        name: a config for classification; its data set's transform is measured.
        device: where :class:`~linsight.heads.classification.LabelledImages` moves the batches.
        batch: images per batch; by default the config's.
        seconds: least time of a measurement, which takes three batches at least.

    Raises:
        ConfigError: the config does not train on a ``TimmDataset``.
    """
    loader = load_config(name).train_dataloader
    if loader.dataset.type != "TimmDataset":
        raise ConfigError(f"{name} trains on {loader.dataset.type}, expected TimmDataset")
    images = batch or loader.batch_size
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a data worker
    try:
        with TemporaryDirectory() as folder:
            _write_images(Path(folder))
            for on_device in (False, True):
                yield _measure(name, loader.dataset, folder, on_device, device, images, seconds)
    finally:
        torch.set_num_threads(threads)


def _measure(
    name: str,
    config: dict,
    folder: str,
    on_device: bool,
    device: torch.device,
    batch: int,
    seconds: float,
) -> str:
    place = {"type": "TimmDataset", "root": folder, "transform": config["transform"]}
    dataset = DATASETS.build({**place, "augment_on_device": on_device})

    def read() -> list:
        return default_collate([dataset[index % len(dataset)] for index in range(batch)])

    data = read()
    preprocess = LabelledImages(num_classes=2).to(device)
    if device.type == "cuda":
        images, labels = data
        pinned = [tensor.pin_memory() for tensor in (images if on_device else [images])]
        data = [type(images)(*pinned) if on_device else pinned[0], labels]
    preprocess(data)
    synchronize(device)
    times: dict[str, list[float]] = {"worker": [], "host": [], "device": []}
    end = time.monotonic() + seconds
    while len(times["worker"]) < _LEAST or time.monotonic() < end:
        begin = time.process_time()
        read()
        times["worker"].append(time.process_time() - begin)
        begin = time.perf_counter()
        preprocess(data)
        times["host"].append(time.perf_counter() - begin)
        synchronize(device)
        times["device"].append(time.perf_counter() - begin)
    worker, host, whole = (float(np.median(values)) for values in times.values())
    where = "on the device" if on_device else "in the workers"
    return (
        f"{name}, augmentation {where}: {batch / worker:,.0f} images/s per core "
        f"({1e3 * worker / batch:.2f} ms per image); a batch of {batch} then takes "
        f"{1e3 * host:.2f} ms of the host, {1e3 * whole:.2f} ms with {device.type}"
    )


def _write_images(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for label, photograph in enumerate(load_sample_images().images):
        image = Image.fromarray(photograph)
        (folder / str(label)).mkdir()
        for index in range(32):
            left, top = draw.integers((image.width - 500, image.height - 375), endpoint=True)
            crop = image.crop((left, top, left + 500, top + 375))
            crop.save(folder / str(label) / f"{index}.jpg", quality=90)
