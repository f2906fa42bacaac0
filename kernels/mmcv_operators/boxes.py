"""Overlaps of boxes and their suppression. Boxes are (x1, y1, x2, y2), in any one unit.

`offset` is 1 where coordinates are indices of pixels, so that a box is x2 - x1 + 1 wide, else 0.
"""

import torch
import torchvision
from torch import Tensor

# soft-NMS: what becomes of the score of a box that overlaps a better one
NAIVE, LINEAR, GAUSSIAN = range(3)


def _overlap(a: Tensor, b: Tensor, offset: int, of_first: bool = False) -> Tensor:
    """Intersection over union (or over the area of `a`) of boxes (..., 4), broadcast."""
    sides = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2]) + offset).clamp(
        min=0
    )
    intersection = sides.prod(-1)
    area = (a[..., 2:] - a[..., :2] + offset).prod(-1)
    if not of_first:
        area = area + (b[..., 2:] - b[..., :2] + offset).prod(-1) - intersection
    return intersection / area.clamp(min=offset)


def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int
) -> None:
    """Overlaps of all pairs into `ious` (M, N), or (N,) of pairs in order if `aligned`.

    `mode` 0 divides by the union, 1 by the area of the first box.
    """
    first = bboxes1 if aligned else bboxes1[:, None]
    ious.copy_(_overlap(first, bboxes2, offset, of_first=mode == 1))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4) that no better one overlaps by more than `iou_threshold`.

    In the order of falling scores.
    """
    # torchvision wants one dtype, and has no 16-bit kernel on the CPU.
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    boxes = boxes.to(dtype)
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return torchvision.ops.nms(boxes, scores.to(dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., 2017): lower the scores of boxes that overlap a better one.

    Method 0 takes a box whose overlap u is at least `iou_threshold` away, 1 multiplies its score
    by 1 - u, 2 multiplies every score by exp(-u² / sigma). A box under `min_score` is dropped.
    The first K rows of `dets` (N, 5) get the kept boxes with their scores, best first; their K
    indices are returned.
    """
    left = torch.arange(len(boxes), device=boxes.device)
    scores = scores.clone()
    kept = []
    while len(left):
        best = scores.argmax()
        dets[len(kept)] = torch.cat((boxes[best], scores[best, None].to(boxes.dtype)))
        kept.append(left[best])
        overlap = _overlap(boxes[best], boxes, offset)
        if method == GAUSSIAN:
            scores = scores * torch.exp(-(overlap**2) / sigma)
        else:
            kept_part = 1 - overlap if method == LINEAR else torch.zeros_like(overlap)
            scores = torch.where(overlap >= iou_threshold, scores * kept_part, scores)
        stays = scores >= min_score
        stays[best] = False
        left, boxes, scores = left[stays], boxes[stays], scores[stays]
    return torch.stack(kept) if kept else left


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of `dets` (N, 5): each box kept by NMS, then those that it suppresses, by score.

    A box is suppressed whose overlap is at least `iou_threshold`.
    """
    left = dets[:, 4].argsort(descending=True, stable=True)
    groups = []
    while len(left):
        boxes = dets[left, :4]
        taken = _overlap(boxes[0], boxes, 0) >= iou_threshold
        taken[0] = True
        groups.append(left[taken].tolist())
        left = left[~taken]
    return groups


def line_nms_forward(
    boxes: Tensor, scores: Tensor, thresh: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """NMS of lanes (CLRNet), each a row of `boxes` (N, 5 + P): x at P heights of the image.

    Column 2 is the height at which the lane starts, in units of P - 1, column 4 its length in
    heights. A lane is suppressed whose mean distance from a better one, over the heights that
    both have, is less than `thresh`.

    Returns:
        The indices of the kept lanes (N,), by score, zeros behind; how many they are; and of
        each lane 1 + the place of the one that kept or suppressed it, 0 if `top_k` came first.
    """
    heights = boxes.shape[1] - 5
    step = torch.arange(heights, device=boxes.device)
    # Rounded to the nearest, halves away from zero, as C does it.
    first = (boxes[:, 2] * (heights - 1) + 0.5).trunc().long()
    length = boxes[:, 4] - 1
    last = first + (length + torch.where(length < 0, -0.5, 0.5)).trunc().long()
    last = last.clamp(max=heights - 1)

    left = scores.argsort(descending=True, stable=True)
    kept = torch.zeros_like(left)
    parent = torch.zeros_like(left)
    count = 0
    while len(left) and count < top_k:
        best = left[0]
        start, end = torch.max(first[best], first[left]), torch.min(last[best], last[left])
        common = (step >= start[:, None]) & (step <= end[:, None])
        distance = (boxes[left, 5:] - boxes[best, 5:]).abs()
        distance = distance.masked_fill(~common, 0).sum(1)
        near = (distance < thresh * (end - start + 1)) & (end >= start) & (start >= 0)
        near[0] = True
        kept[count] = best
        count += 1
        parent[left[near]] = count
        left = left[~near]
    return kept, torch.tensor(count, device=boxes.device), parent
