"""Classifiers and segmentors as other programs run them: pixels in, named outputs out.

A deployed model is an `nn.Module` for `torch.export`. It takes ``images``, uint8 RGB
(B, 3, H, W), as they are after resizing; it normalises them itself, and returns a dict of tensors
by name. Its graph holds for batches of any length and, where the body allows it, for images of any
size. heads/deployment_detection.py has the detectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from .decode_head import resize
from .segmentation import SemanticSegmentor


class Normalize(nn.Module):
    """Pixels from 0 to 255 as a model takes them: ``(images - mean) / std``.

    Args:
        mean, std: of each channel, in the units of the pixels.
        to_bgr: reverse the order of the channels, for models that take BGR; `mean` and `std` are
            of the channels in this order.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], to_bgr: bool = False) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            column = torch.tensor([float(value) for value in values])[:, None, None]
            self.register_buffer(name, column, persistent=False)
        self.to_bgr = to_bgr

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in the dtype of the model, of uint8 images (B, 3, H, W)."""
        x = (images.float() - self.mean.float()) / self.std.float()
        return (x.flip(1) if self.to_bgr else x).to(self.mean.dtype)


class DeployedClassifier(nn.Module):
    """``logits`` (B, num_classes), float32, of ``images``.

    Args:
        model: the classifier.
        mean, std: of its images, in units of the largest pixel.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize([255 * x for x in mean], [255 * x for x in std])
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(self.normalize(images)).float()}


class _GridAverage(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two products of matrices, which runtimes have for any size."""

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        size: Any = pool.output_size
        self.size: tuple[int | None, ...] = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        """Averages (B, C, h, w) of (B, C, H, W) over a grid of h x w cells, which may overlap."""
        if self.size == (1, 1):
            # A product with one column would tie the graph to the width.
            return x.mean((-2, -1), keepdim=True)
        rows, columns = (
            _shares(x, length, cells) for length, cells in zip(x.shape[-2:], self.size, strict=True)
        )
        return rows @ x @ columns.mT


def _shares(like: Tensor, length: int, cells: int | None) -> Tensor:
    """Weights (cells, length) of the pixels of a row in the average of each of its cells."""
    pixel = torch.arange(length, device=like.device)
    if cells is None:
        return (pixel == pixel[:, None]).to(like.dtype)
    cell = torch.arange(cells, device=like.device)[:, None]
    start, end = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    inside = ((pixel >= start) & (pixel < end)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class DeployedSegmentor(nn.Module):
    """``labels`` (B, H, W), int32, and ``logits`` (B, num_classes, H / 4, W / 4), float32.

    The labels are the classes of the images' own pixels. The logits, at the size of the finest map,
    are for programs that want labels at another size, or probabilities.

    Args:
        segmentor: the segmentor. Its windows, scales and flips in testing are not in the graph.
        mean, std: of its images, in units of the largest pixel.
    """

    def __init__(
        self, segmentor: SemanticSegmentor, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.normalize = Normalize([255 * x for x in mean], [255 * x for x in std])
        self.segmentor = segmentor
        for part in list(segmentor.modules()):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.AdaptiveAvgPool2d):
                    setattr(part, name, _GridAverage(child))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.segmentor(self.normalize(images), mode="tensor").float()
        labels = resize(logits, images.shape[-2:]).argmax(1)
        return {"labels": labels.int(), "logits": logits}


# boxes (B, N, 4), scores (B, N), the overlap above which the less probable of two boxes goes, the
# score that a box must exceed, how many boxes are kept per image -> whether each is kept (B, N)
Suppress = Callable[[Tensor, Tensor, float, float, int], Tensor]


def suppress(boxes: Tensor, scores: Tensor, overlap: float, least: float, most: int) -> Tensor:
    """Non-maximum suppression of a batch by torchvision's operator; see `Suppress`."""
    batch, count = scores.shape
    flat = scores.flatten()
    likely = (flat > least).nonzero()[:, 0]
    # Images are put side by side, so that their boxes do not overlap: in float64, because the
    # spacing of float32's numbers is a part of a pixel there.
    wide = boxes.flatten(0, 1).double()[likely]
    span = boxes.amax().double() + 1
    aside = (likely // count).double()[:, None] * span
    # A traced graph takes the operator to keep two boxes or more: two that overlap none come last.
    last = boxes.amin().double() + boxes.new_tensor([[-4.0], [-2.0]]).double()
    last = torch.cat([last, last, last + 1, last + 1], 1)
    candidates = torch.cat([wide + aside, last])
    values = torch.cat([flat[likely].double(), last.new_full((2,), -torch.inf)])
    kept = torchvision.ops.nms(candidates, values, overlap)[:-2]
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep = keep.index_put((likely[kept],), torch.ones_like(kept, dtype=torch.bool))
    return keep.view(batch, count)
