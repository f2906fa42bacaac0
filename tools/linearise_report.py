"""How a student of `linsight linearise` compares with its teacher at several image sizes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.registry import DATASETS
from rich.table import Table
from torch import Tensor

from linsight.tools.benchmark_cases import default_batch
from linsight.tools.benchmark_timing import peak_memory, quantiles, release
from linsight.tools.look import attend_from, colour_features

# Pictures that are compared at each size, that are drawn, and for each number of linear blocks.
COMPARED, DRAWN, COUNTED = 16, 4, 8
# Fewer large pictures at once leave a GPU waiting for its host.
SECONDS, LEAST_BATCH = 0.2, 8
# Where attention looks from, as shares of a picture's width and height.
POINTS = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))


@torch.inference_mode()
def compare_sizes(
    teacher: Any, student: Any, dataset: dict, sizes: Sequence[int], device: torch.device
) -> list[dict[str, Any]]:
    """Agreement, speed and memory of two models of one body at several image sizes.

    Args:
        teacher, student: the models, in evaluation mode.
        dataset: config of a data set with a transform, whose first pictures are compared.
        sizes: sides of square images in pixels.
        device: where both run.

    Returns:
        For each size a dict: ``cosine``, the mean over the tokens of the map and over the pictures
        of the cosine between the models' features in float32, in percent; ``teacher`` and
        ``student``, each with ``images_per_second`` and ``memory`` in MiB (None on a CPU) of
        inference in bfloat16 on a GPU, and in float32 on a CPU; and ``batch``, how many images
        these are of.
    """
    rows = []
    for size in sizes:
        pictures = load_pictures(dataset, size, COMPARED)
        cosines = [
            F.cosine_similarity(*(map_tokens(m, x, device) for m in (teacher, student)), dim=-1)
            for x in pictures
        ]
        row: dict[str, Any] = {
            "size": size,
            "pictures": len(pictures),
            "cosine": round(100 * torch.cat(cosines).mean().item(), 2),
        }
        least = LEAST_BATCH if device.type == "cuda" else 1
        row["batch"] = batch = max(default_batch("inference", size, device), least)
        for name, model in (("teacher", teacher), ("student", student)):
            row[name] = measure(model, torch.randn(batch, *pictures[0].shape), device)
        rows.append(row)
    return rows


def compare_attention(
    teacher: Any, student: Any, dataset: dict, size: int, device: torch.device
) -> dict[str, float]:
    """Agreement of what two models of one body attend to, as `tools.look.attend_from` finds it.

    Args:
        teacher, student, dataset, device: as for `compare_sizes`.
        size: side of square images in pixels.

    Returns:
        For the last block of each resolution, by name, the mean over five points and over the
        pictures of the cosine between the models' maps of attention, in percent. Blocks whose
        mixers project no values, or convolve them first, are left out.
    """
    cosines: dict[str, list[float]] = {}
    for picture in load_pictures(dataset, size, DRAWN):
        x = picture[None].to(device)
        for point in POINTS:
            wanted = {a.name: a.weights for a in attend_from(teacher, x, point)}
            for found in attend_from(student, x, point):
                if found.name in wanted:
                    pair = (found.weights.flatten(), wanted[found.name].flatten())
                    cosines.setdefault(found.name, []).append(
                        F.cosine_similarity(*pair, dim=0).item()
                    )
    return {block: round(100 * sum(v) / len(v), 2) for block, v in cosines.items()}


@torch.inference_mode()
def compare_blocks(
    teacher: Any,
    student: Any,
    blocks: Sequence[int],
    dataset: dict,
    size: int,
    device: torch.device,
    file: Path,
) -> dict[str, list[float]]:
    """Agreement when some of the student's linear blocks stand among blocks of the teacher.

    Args:
        teacher, student, dataset, device: as for `compare_sizes`.
        blocks: indices of the student's linear blocks.
        size: side of square images in pixels.
        file: a drawing of the result.

    Returns:
        ``first`` and ``last``: the cosines in percent, in the sense of `compare_sizes`, with the
        first 1, 2, ... of the linear blocks, and with the last 1, 2, ...
    """
    pictures = load_pictures(dataset, size, COUNTED)
    wanted = [map_tokens(teacher, x, device) for x in pictures]
    places = student.block_places()
    own = [stage[i] for stage, i in places]
    theirs = [stage[i] for stage, i in teacher.block_places()]

    def place(linear: Sequence[int]) -> None:
        for i in blocks:
            stage, index = places[i]
            stage[index] = own[i] if i in linear else theirs[i]

    def agreement(linear: Sequence[int]) -> float:
        place(linear)
        got = [map_tokens(student, x, device) for x in pictures]
        cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(got, wanted, strict=True)]
        return round(100 * torch.cat(cosines).mean().item(), 2)

    counts = range(1, len(blocks) + 1)
    try:
        first = [agreement(blocks[:count]) for count in counts]
        # All of them are the last ones as well.
        last = [agreement(blocks[-count:]) for count in counts[:-1]] + first[-1:]
        rows = {"first": first, "last": last}
    finally:
        place(blocks)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(rows.items(), ("o-", "s--"), strict=True):
        axes.plot(counts, values, style, markersize=4, label=f"the {name} ones")
    axes.set(xlabel="linear blocks", ylabel=f"cosine per token at {size} px, %")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    return rows


def measure(model: Any, images: Tensor, device: torch.device) -> dict[str, float | None]:
    """The images per second of a model's features, and the memory in MiB of its weights and its
    pass."""
    release()
    cuda = device.type == "cuda"
    held = torch.cuda.memory_allocated(device) / 2**20 if cuda else 0
    # A copy, since `to` changes a model in place.
    copy = deepcopy(model).to(device, torch.bfloat16 if cuda else torch.float32)
    images = images.to(device, next(copy.parameters()).dtype)
    milliseconds = quantiles(lambda: copy.forward_features(images), device, SECONDS)[1]
    memory = peak_memory(lambda: copy.forward_features(images), device)
    return {
        "images_per_second": round(1000 * len(images) / milliseconds, 1),
        "memory": None if memory is None else round(memory - held),
    }


def load_pictures(dataset: dict, size: int, count: int) -> list[Tensor]:
    """The first pictures of a data set as float tensors (C, size, size)."""
    source: Any = DATASETS.build(
        {**dataset, "transform": {**dataset["transform"], "input_size": size}}
    )
    return [source[i][0] for i in range(min(count, len(source)))]


def map_tokens(model: Any, picture: Tensor, device: torch.device) -> Tensor:
    """The features (H * W, C) of a picture's patches, in float32."""
    features = model.forward_features(picture[None].to(device)).float()
    if features.ndim == 4:  # a map (B, H, W, C)
        return features[0].flatten(0, 1)
    return features[0, model.num_prefix_tokens :]


@torch.inference_mode()
def draw_features(
    teacher: Any, student: Any, dataset: dict, size: int, device: torch.device, file: Path
) -> None:
    """Draw pictures, and the three principal components of their features in each of the models as
    red, green and blue; the components are those of the teacher."""
    pictures = load_pictures(dataset, size, DRAWN)
    figure = Figure(figsize=(6, 2 * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), 3, squeeze=False)
    for row, picture in zip(axes, pictures, strict=True):
        tokens = [map_tokens(m, picture, device).cpu() for m in (teacher, student)]
        side = round(len(tokens[0]) ** 0.5)
        maps = [t.T.unflatten(1, (side, side)) for t in tokens]
        shown = picture.permute(1, 2, 0).float()
        shown = (shown - shown.amin()) / (shown.amax() - shown.amin()).clamp(min=1e-6)
        row[0].imshow(shown.squeeze(-1).numpy(), cmap="gray")
        for cell, features in zip(row[1:], maps, strict=True):
            cell.imshow(colour_features(features, like=maps[0]))
        for cell in row:
            cell.axis("off")
    for cell, title in zip(axes[0], ("picture", "teacher", "student"), strict=True):
        cell.set_title(title)
    figure.savefig(file, dpi=120)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `compare_sizes` as a table of the command line."""
    columns = ("px", "cosine %", "teacher img/s", "student img/s", "teacher MiB", "student MiB")
    shown = Table(*columns)
    for row in rows:
        models = row["teacher"], row["student"]
        rates = [f"{m['images_per_second']:g}" for m in models]
        memory = ["-" if m["memory"] is None else f"{m['memory']}" for m in models]
        shown.add_row(str(row["size"]), f"{row['cosine']:.2f}", *rates, *memory)
    return shown
