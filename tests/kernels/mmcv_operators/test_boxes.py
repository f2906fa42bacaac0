import math

import pytest
import torch
import torchvision

from linsight.kernels.mmcv_operators.boxes import (
    bbox_overlaps,
    line_nms_forward,
    nms,
    nms_match,
    softnms,
)


def random_boxes(count: int, dtype=torch.float32) -> torch.Tensor:
    corners = torch.rand(count, 2, dtype=dtype) * 20
    return torch.cat((corners, corners + torch.rand(count, 2, dtype=dtype) * 15), dim=1)


def overlap(a: list[float], b: list[float], offset: int = 0) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    intersection = max(width, 0) * max(height, 0)
    areas = [(x[2] - x[0] + offset) * (x[3] - x[1] + offset) for x in (a, b)]
    return intersection / (sum(areas) - intersection)


def plain_nms(boxes, scores, threshold, offset):
    left = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    while left:
        best, *left = left
        kept.append(best)
        left = [i for i in left if overlap(boxes[best], boxes[i], offset) <= threshold]
    return kept


@pytest.mark.parametrize("offset", [0, 1])
def test_nms(seed, offset):
    boxes, scores = random_boxes(60, torch.float64), torch.rand(60, dtype=torch.float64)
    found = nms(boxes, scores, iou_threshold=0.4, offset=offset)
    assert found.tolist() == plain_nms(boxes.tolist(), scores.tolist(), 0.4, offset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nms_of_mixed_and_narrow_dtypes(dtype):
    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 7], [20, 20, 30, 30]], dtype=dtype)
    scores = torch.tensor([0.5, 0.75, 0.25])
    assert nms(boxes, scores, iou_threshold=0.5, offset=0).tolist() == [1, 2]


def test_nms_of_no_boxes():
    assert nms(torch.zeros(0, 4), torch.zeros(0), iou_threshold=0.5, offset=0).shape == (0,)


def plain_softnms(boxes, scores, threshold, sigma, least, method, offset):
    left = [[score, i] for i, score in enumerate(scores)]
    kept = []
    while left:
        best = max(left, key=lambda pair: pair[0])
        left.remove(best)
        kept.append(best)
        for pair in left:
            u = overlap(boxes[best[1]], boxes[pair[1]], offset)
            if method == 2:
                pair[0] *= math.exp(-u * u / sigma)
            elif u >= threshold:
                pair[0] *= (1 - u) if method == 1 else 0
        left = [pair for pair in left if pair[0] >= least]
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", [0, 1, 2])
def test_softnms(seed, method, offset):
    boxes, scores = random_boxes(40, torch.float64), torch.rand(40, dtype=torch.float64)
    dets, before = torch.full((40, 5), torch.nan, dtype=torch.float64), scores.clone()
    inds = softnms(
        boxes,
        scores,
        dets,
        iou_threshold=0.3,
        sigma=0.5,
        min_score=0.05,
        method=method,
        offset=offset,
    )
    expected = plain_softnms(boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.05, method, offset)
    assert inds.tolist() == [i for _, i in expected]
    kept = dets[: len(inds)]
    torch.testing.assert_close(kept[:, :4], boxes[inds])
    torch.testing.assert_close(kept[:, 4], torch.tensor([s for s, _ in expected]).double())
    assert torch.equal(scores, before)


def test_softnms_of_no_boxes():
    none = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5)
    inds = softnms(*none, iou_threshold=0.3, sigma=0.5, min_score=0.0, method=1, offset=0)
    assert inds.shape == (0,)
    assert inds.dtype == torch.long


def test_nms_match(seed):
    dets = torch.cat((random_boxes(50), torch.rand(50, 1)), dim=1)
    groups = nms_match(dets, iou_threshold=0.4)
    boxes, scores = dets[:, :4].tolist(), dets[:, 4].tolist()
    assert [group[0] for group in groups] == plain_nms(boxes, scores, 0.4, 0)
    assert sorted(i for group in groups for i in group) == list(range(50))
    for group in groups:
        assert [scores[i] for i in group] == sorted((scores[i] for i in group), reverse=True)
        assert all(overlap(boxes[group[0]], boxes[i]) >= 0.4 for i in group)


def test_nms_match_of_a_box_without_area():
    dets = torch.tensor([[3.0, 3, 3, 3, 0.5], [3, 3, 3, 3, 0.25]])
    assert nms_match(dets, iou_threshold=0.5) == [[0], [1]]


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("offset", [0, 1])
def test_bbox_overlaps(seed, mode, offset):
    a, b = random_boxes(7, torch.float64), random_boxes(7, torch.float64)
    expected = torchvision.ops.box_iou(
        torch.cat((a[:, :2], a[:, 2:] + offset), 1), torch.cat((b[:, :2], b[:, 2:] + offset), 1)
    )
    if mode == 1:  # over the first box's area
        union = 1 / (1 + expected)  # intersection / (area a + area b) is u / (1 + u)
        areas = [(x[:, 2:] - x[:, :2] + offset).prod(1) for x in (a, b)]
        expected = expected * union * (areas[0][:, None] + areas[1]) / areas[0][:, None]
    ious = torch.full((7, 7), torch.nan, dtype=torch.float64)
    bbox_overlaps(a, b, ious, mode=mode, aligned=False, offset=offset)
    torch.testing.assert_close(ious, expected)
    pairs = torch.full((7,), torch.nan, dtype=torch.float64)
    bbox_overlaps(a, b, pairs, mode=mode, aligned=True, offset=offset)
    torch.testing.assert_close(pairs, expected.diagonal())


def plain_line_nms(lanes, scores, threshold, top_k):
    heights = len(lanes[0]) - 5
    spans = []
    for lane in lanes:
        start = int(lane[2] * (heights - 1) + 0.5)
        length = lane[4] - 1
        spans.append((start, start + int(length) + int(0.5 - (length < 0))))
    order = sorted(range(len(lanes)), key=lambda i: -scores[i])
    kept, parent = [], [0] * len(lanes)
    for best in order:
        if parent[best]:
            continue
        kept.append(best)
        for other in [i for i in order if not parent[i]]:
            start = max(spans[best][0], spans[other][0])
            end = min(spans[best][1], spans[other][1], heights - 1)
            total = sum(
                abs(lanes[best][5 + i] - lanes[other][5 + i]) for i in range(start, end + 1)
            )
            if other == best or (end >= start and total < threshold * (end - start + 1)):
                parent[other] = len(kept)
        if len(kept) == top_k:
            break
    return kept, parent


@pytest.mark.parametrize("top_k", [3, 50])
def test_line_nms(seed, top_k):
    lanes = torch.zeros(30, 5 + 12, dtype=torch.float64)
    lanes[:, 2] = torch.rand(30)
    lanes[:, 4] = torch.randint(1, 9, (30,))
    lanes[:, 5:] = torch.rand(30, 1) * 40 + torch.rand(30, 12)
    scores = torch.rand(30)
    kept, count, parent = line_nms_forward(lanes, scores, 4.0, top_k)
    expected, parents = plain_line_nms(lanes.tolist(), scores.tolist(), 4.0, top_k)
    assert kept[:count].tolist() == expected
    assert parent.tolist() == parents
