"""mmdet's detectors as other programs run them: pixels in, boxes, labels, scores and masks out.

mmdet loops over the images of a batch and drops what it does not need, so that the sizes of its
tensors depend on their values. Here a batch is computed at once and every tensor has a size that
the images' size determines: objects that are not there have the score 0 and the label -1. What
comes out is what mmdet gives for images that need no resizing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models import BaseDetector, CascadeRoIHead, StandardRoIHead
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import DINO, SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn

from ..kernels.mmcv_operators.deformable_attention import reference as deformable_attention
from .deployment import Normalize, Suppress, suppress

# Below every score, for what is no object.
NOTHING = -1.0


class DeployedDetector(nn.Module):
    """``boxes`` (B, N, 4), ``labels`` (B, N), ``scores`` (B, N) and ``masks`` (B, N, H, W).

    Boxes are float32 (x1, y1, x2, y2) in pixels of the images, labels int32, scores float32, masks
    bool; only detectors of masks give masks. N is the most objects of an image, the best first; the
    rows behind the last object have the score 0 and the label -1.

    Args:
        detector: one of mmdet's, in evaluation mode: with one stage (RetinaNet and others that
            predict as `BaseDenseHead` does), with two (Faster, Mask and Cascade R-CNN), or DINO.
        suppress: the operator of non-maximum suppression.

    Raises:
        ValueError: the detector predicts in another way, or suppresses boxes in another way.
    """

    def __init__(self, detector: BaseDetector, suppress: Suppress = suppress) -> None:
        super().__init__()
        prepare: Any = detector.data_preprocessor
        if not getattr(prepare, "_enable_normalize", False):
            raise ValueError("data_preprocessor has no mean and std, with which to prepare images")
        mean, std = (x.flatten().tolist() for x in (prepare.mean, prepare.std))
        self.normalize = Normalize(mean, std, to_bgr=not prepare._channel_conversion)
        self.divisor, self.pad_value = prepare.pad_size_divisor, prepare.pad_value
        self.detector = detector
        self.suppress = suppress
        detect = _detection_of(detector)
        self.detect = detect
        if detect is _detect_queries:
            _replace_attention(detector)

    @property
    def takes_half(self) -> bool:
        """Whether it computes in half precision, too: DINO's queries are coordinates, which half
        precision rounds to whole pixels and more."""
        return self.detect is not _detect_queries

    @property
    def stride(self) -> int:
        """Of the coarsest map, in pixels."""
        detector: Any = self.detector
        if self.detect is _detect_queries:
            backbone = detector.backbone
            stride = backbone.model.feature_info[backbone.out_indices[-1]]["reduction"]
            return stride * 2 ** len(detector.neck.extra_convs or ())
        head = detector.rpn_head if self.detect is _detect_regions else detector.bbox_head
        return max(map(max, head.prior_generator.strides))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.normalize(images)
        height, width = images.shape[-2:]
        padding = (0, -width % self.divisor, 0, -height % self.divisor)
        x = F.pad(x, padding, value=self.pad_value)
        return self.detect(self, x, height, width)


def _detection_of(detector: BaseDetector) -> Callable:
    """The function below that computes what the detector predicts.

    Raises:
        ValueError: none does.
    """
    kind = type(detector)
    refused = f"the detector {kind.__name__} cannot be exported: "
    if isinstance(detector, DINO):
        return _detect_queries
    if isinstance(detector, TwoStageDetector):
        head: Any = detector.roi_head
        if type(head) not in (StandardRoIHead, CascadeRoIHead) or head.with_shared_head:
            raise ValueError(f"{refused}its roi_head {type(head).__name__} predicts in its own way")
        extractors = [head.bbox_roi_extractor]
        if head.with_mask:
            extractors.append(head.mask_roi_extractor)
        for extractor in extractors:
            for each in extractor if isinstance(extractor, nn.ModuleList) else [extractor]:
                if type(each) is not SingleRoIExtractor:
                    raise ValueError(f"{refused}{type(each).__name__} is not SingleRoIExtractor")
        _check_suppression(refused, head.test_cfg.nms)
        _check_suppression(refused, detector.rpn_head.test_cfg.nms)
        if type(detector.rpn_head) is not RPNHead:
            raise ValueError(f"{refused}its rpn_head is a {type(detector.rpn_head).__name__}")
        return _detect_regions
    if isinstance(detector, SingleStageDetector):
        head = detector.bbox_head
        for name in ("predict_by_feat", "_predict_by_feat_single", "_bbox_post_process"):
            if getattr(type(head), name, None) is not getattr(BaseDenseHead, name):
                raise ValueError(f"{refused}its {type(head).__name__} predicts in its own way")
        _check_suppression(refused, head.test_cfg.nms)
        return _detect_densely
    raise ValueError(f"{refused}it is of neither one stage nor two, and no DINO")


def _check_suppression(refused: str, settings: dict) -> None:
    if settings.get("type", "nms") != "nms":
        raise ValueError(f"{refused}its boxes are suppressed by {settings['type']}, not by nms")


# Detectors of one stage.


def _detect_densely(self: DeployedDetector, x: Tensor, height: int, width: int) -> dict:
    head: Any = self.detector.bbox_head
    settings = head.test_cfg
    maps = head(self.detector.extract_feat(x))
    scores, deltas = maps[:2]
    factors = maps[2] if len(maps) > 2 else None
    kept = []
    for level, (priors, score, delta) in enumerate(
        zip(_priors(head, scores), map(_rows, scores), map(_rows, deltas), strict=True)
    ):
        score = _activate(head, score.unflatten(-1, (-1, head.cls_out_channels)).flatten(1, 2))
        delta = delta.unflatten(-1, (-1, head.bbox_coder.encode_size)).flatten(1, 2)
        classes = score.shape[-1]
        best, place = _best(
            torch.where(score > settings.get("score_thr", 0), score, NOTHING).flatten(1),
            settings.get("nms_pre", -1),
        )
        anchor = place // classes
        if factors is not None:
            factor = _rows(factors[level]).flatten(1).sigmoid()
            best = torch.where(best > NOTHING, best * factor.gather(1, anchor), best)
        boxes = _decode(head.bbox_coder, priors[anchor], _pick(delta, anchor))
        kept.append((boxes, best, place % classes))
    boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(*kept, strict=True))
    boxes = _clip(boxes, height, width)
    scores = _drop_small(boxes, scores, settings)
    boxes, scores, labels = _select(self, boxes, scores, labels, settings, settings.max_per_img)
    return _named(boxes, scores, labels)


def _rows(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as rows (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def _activate(head: Any, scores: Tensor) -> Tensor:
    if getattr(head.loss_cls, "custom_cls_channels", False):
        return head.loss_cls.get_activation(scores)
    return (
        scores.float().sigmoid() if head.use_sigmoid_cls else scores.float().softmax(-1)[..., :-1]
    )


def _priors(head: Any, maps: Sequence[Tensor]) -> list[Tensor]:
    sizes = [x.shape[-2:] for x in maps]
    return head.prior_generator.grid_priors(sizes, dtype=torch.float32, device=maps[0].device)


def _best(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `most` highest of each row of (B, N), and where they stand; behind the last are rows of
    `NOTHING`. All of them if `most` is not positive."""
    if most <= 0:
        return scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    # With rows of nothing, as many are taken of a map of few pixels as of one of many.
    best = F.pad(scores, (0, most), value=NOTHING).topk(most)
    # TensorRT clamps no integers.
    last = torch.scalar_tensor(scores.shape[1] - 1, dtype=torch.int64, device=scores.device)
    return best.values, torch.minimum(best.indices, last)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, C) of x (B, N, C) at index (B, K)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _decode(coder: Any, priors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (B, N, 4), not clipped, of priors (B, N, 4) and what a head says of them."""
    boxes = coder.decode(priors.flatten(0, 1), deltas.float().flatten(0, 1))
    return boxes.view(deltas.shape[0], deltas.shape[1], 4)


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x, y), -1).flatten(-2)


def _drop_small(boxes: Tensor, scores: Tensor, settings: Any) -> Tensor:
    """Scores (B, N), `NOTHING` for boxes that are not larger than ``min_bbox_size``."""
    least = settings.get("min_bbox_size", -1)
    if least < 0:
        return scores
    sides = boxes[..., 2:] - boxes[..., :2]
    return torch.where((sides > least).all(-1), scores, NOTHING)


def _select(
    self: DeployedDetector,
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    settings: Any,
    most: int,
    least: float = NOTHING / 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """What suppression keeps of boxes (B, N, 4): `most` boxes, scores and groups per image.

    Boxes suppress those of their own group alone, unless ``class_agnostic`` is set.
    """
    apart = boxes
    if not settings.nms.get("class_agnostic", False):
        # As mmcv does it: groups are moved so far apart that they do not overlap.
        apart = boxes + (groups * (boxes.amax((1, 2), keepdim=True)[..., 0] + 1))[..., None]
    keep = self.suppress(apart, scores, float(settings.nms["iou_threshold"]), float(least), most)
    scores, place = _best(torch.where(keep, scores, NOTHING), most)
    return _pick(boxes, place), scores, groups.gather(1, place)


def _named(boxes: Tensor, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    there = scores > NOTHING
    return {
        "boxes": torch.where(there[..., None], boxes, 0.0),
        "labels": torch.where(there, labels, -1).int(),
        "scores": torch.where(there, scores, 0.0),
    }


# Detectors of two stages.


def _detect_regions(self: DeployedDetector, x: Tensor, height: int, width: int) -> dict:
    maps: Any = self.detector.extract_feat(x)
    rois, there = _propose(self, maps, height, width)
    head: Any = self.detector.roi_head
    settings = head.test_cfg
    cascade = isinstance(head, CascadeRoIHead)
    extractors = head.bbox_roi_extractor if cascade else [head.bbox_roi_extractor]
    heads = head.bbox_head if cascade else [head.bbox_head]
    total: Any = 0
    for stage, (extractor, part) in enumerate(zip(extractors, heads, strict=True)):
        scores, deltas = (
            y.unflatten(0, rois.shape[:2]).float() for y in part(_extract(extractor, maps, rois))
        )
        total = total + scores
        if stage < len(heads) - 1:
            rois = _refine(part, rois, scores, deltas, height, width)
    scores = _probabilities(heads[-1], total / len(heads))
    boxes = _decode_classes(heads[-1], rois, deltas)
    boxes = _clip(boxes, height, width)
    classes = scores.shape[-1]
    if boxes.shape[2] == 1:
        boxes = boxes.expand(-1, -1, classes, -1)
    labels = torch.arange(classes, device=x.device).expand_as(scores)
    scores = torch.where(there[..., None], scores, NOTHING)
    boxes, scores, labels = _select(
        self,
        boxes.flatten(1, 2),
        scores.flatten(1),
        labels.flatten(1),
        settings,
        settings.max_per_img,
        settings.score_thr,
    )
    found = _named(boxes, scores, labels)
    if head.with_mask:
        found["masks"] = (
            _outline(head, maps, boxes, labels, height, width)
            & (found["labels"] >= 0)[..., None, None]
        )
    return found


def _propose(
    self: DeployedDetector, maps: Sequence[Tensor], height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Regions (B, N, 4) of the region proposal network, and whether each is one (B, N)."""
    head: Any = self.detector.rpn_head
    settings = head.test_cfg
    scores, deltas = head(maps)
    kept = []
    for level, (priors, score, delta) in enumerate(
        zip(_priors(head, scores), map(_rows, scores), map(_rows, deltas), strict=True)
    ):
        score = _activate(head, score.unflatten(-1, (-1, head.cls_out_channels)).flatten(1, 2))
        delta = delta.unflatten(-1, (-1, head.bbox_coder.encode_size)).flatten(1, 2)
        best, anchor = _best(score.flatten(1), settings.get("nms_pre", -1))
        boxes = _decode(head.bbox_coder, priors[anchor], _pick(delta, anchor))
        kept.append((boxes, best, torch.full_like(anchor, level)))
    boxes, best, levels = (torch.cat(parts, 1) for parts in zip(*kept, strict=True))
    boxes = _clip(boxes, height, width)
    best = _drop_small(boxes, best, settings)
    boxes, best, _ = _select(self, boxes, best, levels, settings, settings.max_per_img)
    return boxes, best > NOTHING


def _probabilities(head: Any, scores: Tensor) -> Tensor:
    """Probabilities (B, N, classes), without the background, of a box head's (B, N, C)."""
    if head.custom_cls_channels:
        return head.loss_cls.get_activation(scores)[..., : head.num_classes]
    return scores.softmax(-1)[..., :-1]


def _decode_classes(head: Any, rois: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (B, N, classes, 4), or (B, N, 1, 4) if the head's boxes are for all classes."""
    deltas = deltas.unflatten(-1, (-1, head.bbox_coder.encode_size))
    classes = deltas.shape[2]
    priors = rois[:, :, None].expand(-1, -1, classes, -1).flatten(1, 2)
    return _decode(head.bbox_coder, priors, deltas.flatten(1, 2)).unflatten(1, (-1, classes))


def _refine(
    head: Any, rois: Tensor, scores: Tensor, deltas: Tensor, height: int, width: int
) -> Tensor:
    """The regions of the next stage of a cascade."""
    boxes = _decode_classes(head, rois, deltas)
    if boxes.shape[2] == 1:
        boxes = boxes[:, :, 0]
    else:
        label = scores[..., :-1].argmax(-1)
        boxes = boxes.gather(2, label[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    return _clip(boxes, height, width)


def _extract(extractor: Any, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
    """What the maps show in regions (B, N, 4): (B N, C, h, w)."""
    batch, count = rois.shape[:2]
    image = torch.arange(batch, device=rois.device, dtype=rois.dtype)[:, None].expand(-1, count)
    rois = torch.cat((image.reshape(-1, 1), rois.flatten(0, 1)), 1)
    layers = extractor.roi_layers
    if len(layers) == 1:
        return _align(layers[0], maps[0], rois)
    levels = extractor.map_roi_levels(rois, len(layers))
    result = maps[0].new_zeros(rois.shape[0], extractor.out_channels, *layers[0].output_size)
    for level, layer in enumerate(layers):
        here = (levels == level).nonzero()[:, 0]
        result = result.index_copy(0, here, _align(layer, maps[level], rois[here]))
    return result


def _align(layer: Any, x: Tensor, rois: Tensor) -> Tensor:
    return torchvision.ops.roi_align(
        x,
        rois.to(x.dtype),
        layer.output_size,
        layer.spatial_scale,
        max(layer.sampling_ratio, 0),
        layer.aligned,
    )


def _outline(
    head: Any, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor, height: int, width: int
) -> Tensor:
    """Masks (B, N, H, W) of boxes (B, N, 4)."""
    cascade = isinstance(head, CascadeRoIHead)
    extractors = head.mask_roi_extractor if cascade else [head.mask_roi_extractor]
    heads = head.mask_head if cascade else [head.mask_head]
    total: Any = 0
    for extractor, part in zip(extractors, heads, strict=True):
        total = total + part(_extract(extractor, maps, boxes)).float().sigmoid()
    masks = total / len(heads)  # (B N, classes or 1, h, w)
    if masks.shape[1] > 1:
        index = labels.flatten()[:, None, None, None]
        masks = masks.gather(1, index.expand(-1, 1, *masks.shape[2:]))
    masks = masks[:, 0].unflatten(0, boxes.shape[:2])
    # Bilinear interpolation is linear in each direction: two products of matrices.
    columns = _interpolation(boxes[..., 0::2], width, masks.shape[-1])
    rows = _interpolation(boxes[..., 1::2], height, masks.shape[-2])
    return rows @ masks @ columns.mT >= head.test_cfg.mask_thr_binary


def _interpolation(edges: Tensor, length: int, samples: int) -> Tensor:
    """Weights (B, N, length, samples) of samples between two edges (B, N, 2) at each pixel."""
    start, end = edges[..., :1], edges[..., 1:]
    pixel = torch.arange(length, device=edges.device, dtype=edges.dtype) + 0.5
    place = (pixel - start) / (end - start).clamp(min=1e-6) * samples - 0.5
    index = torch.arange(samples, device=edges.device, dtype=edges.dtype)
    return (1 - (place[..., None] - index).abs()).clamp(min=0)


# DINO.


def _detect_queries(self: DeployedDetector, x: Tensor, height: int, width: int) -> dict:
    detector: Any = self.detector
    head = detector.bbox_head
    maps = detector.extract_feat(x)
    sizes = [tuple(each.shape[-2:]) for each in maps]
    # Of which places a map shows padding is the same for all images: (1, h, w).
    masks = [_outside(x, size, height, width) for size in sizes]
    centres, ratios = zip(*map(_centres, masks), strict=True)
    ratio = torch.stack(ratios, 1)  # (1, levels, 2)
    padding = torch.cat([mask.flatten(1) for mask in masks], 1).expand(x.shape[0], -1)
    shared = {
        "key_padding_mask": padding,
        "spatial_shapes": sizes,
        "level_start_index": None,
        "valid_ratios": ratio,
    }
    memory = torch.cat([_rows(each) for each in maps], 1)
    positions = [
        _rows(detector.positional_encoding(mask)).to(x.dtype) + embedding
        for mask, embedding in zip(masks, detector.level_embed, strict=True)
    ]
    for layer in detector.encoder.layers:
        memory = layer(
            query=memory,
            query_pos=torch.cat(positions, 1),
            reference_points=torch.cat(centres, 1)[:, :, None] * ratio[:, None],
            **shared,
        )
    states, points = detector.decoder(
        query=detector.query_embedding.weight[None].expand(x.shape[0], -1, -1),
        value=memory,
        self_attn_mask=None,
        reference_points=_queries(detector, memory, padding, centres),
        reg_branches=head.reg_branches,
        **shared,
    )
    scores, boxes = (each[-1].float() for each in head(states, points))
    most = detector.test_cfg.get("max_per_img", detector.num_queries)
    if head.loss_cls.use_sigmoid:
        best = scores.sigmoid().flatten(1).topk(most)
        query, labels = best.indices // head.num_classes, best.indices % head.num_classes
    else:
        probable = scores.softmax(-1)[..., :-1].max(-1)
        best = probable.values.topk(most)
        query, labels = best.indices, probable.indices.gather(1, best.indices)
    boxes = bbox_cxcywh_to_xyxy(_pick(boxes, query))
    boxes = torch.stack((boxes[..., 0::2] * width, boxes[..., 1::2] * height), -1).flatten(-2)
    return _named(_clip(boxes, height, width), best.values, labels)


def _outside(x: Tensor, size: tuple[int, int], height: int, width: int) -> Tensor:
    """Whether the pixels (1, h, w) of a map of images (B, C, H, W) show padding, which begins at
    `height` and `width`."""
    rows, columns = (
        torch.arange(side, device=x.device) * whole // side >= end
        for side, whole, end in zip(size, x.shape[-2:], (height, width), strict=True)
    )
    return (rows[:, None] | columns)[None]


def _centres(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places (1, h w, 2) of a map's pixels, from 0 to 1 across what is not padding, and the share
    (1, 2) of the map that is not padding; x before y."""
    height, width = mask.shape[1:]
    inside = (~mask).float()
    extent = torch.stack((inside[:, 0].sum(1), inside[:, :, 0].sum(1)), -1)
    y = torch.arange(height, device=mask.device, dtype=torch.float32)[:, None].expand(-1, width)
    x = torch.arange(width, device=mask.device, dtype=torch.float32).expand(height, -1)
    place = torch.stack((x, y), -1).flatten(0, 1)[None] + 0.5
    whole = torch.stack((_number(inside, width), _number(inside, height)))
    return place / extent[:, None], extent / whole


def _queries(detector: Any, memory: Tensor, padding: Tensor, centres: Sequence[Tensor]) -> Tensor:
    """Where the decoder's queries start: (B, num_queries, 4), as centre and size, from 0 to 1."""
    sizes = [torch.full_like(place, 0.05 * 2.0**level) for level, place in enumerate(centres)]
    proposals = torch.cat((torch.cat(list(centres), 1), torch.cat(sizes, 1)), -1)
    valid = ((proposals > 0.01) & (proposals < 0.99)).all(-1) & ~padding
    proposals = torch.log(proposals / (1 - proposals))
    proposals = torch.where(valid[..., None], proposals, torch.inf)
    memory = torch.where(valid[..., None], memory, 0.0)
    memory = detector.memory_trans_norm(detector.memory_trans_fc(memory))
    # The branches behind those of the decoder's layers are the encoder's.
    last = detector.decoder.num_layers
    scores = detector.bbox_head.cls_branches[last](memory).amax(-1)
    boxes = detector.bbox_head.reg_branches[last](memory) + proposals
    return _pick(boxes, scores.topk(detector.num_queries, dim=1).indices).sigmoid()


class _Attention(nn.Module):
    """mmcv's deformable attention where the maps' sizes are numbers, not a tensor of them."""

    def __init__(self, attention: MultiScaleDeformableAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Any = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = (),
        **_: Any,
    ) -> Tensor:
        part: Any = self.attention
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        levels, points = part.num_levels, part.num_points
        value = part.value_proj(value)
        if key_padding_mask is not None:
            value = torch.where(key_padding_mask[..., None], 0.0, value)
        value = value.unflatten(-1, (part.num_heads, -1))
        shape = (part.num_heads, levels, points)
        offsets = part.sampling_offsets(query).unflatten(-1, (*shape, 2))
        weights = part.attention_weights(query).unflatten(-1, (part.num_heads, -1)).softmax(-1)
        places = reference_points[:, :, None, :, None]
        if places.shape[-1] == 2:
            sides = [_number(query, side) for size in spatial_shapes for side in reversed(size)]
            places = places + offsets / torch.stack(sides).view(levels, 1, 2)
        else:
            places = places[..., :2] + offsets / points * places[..., 2:] * 0.5
        sampled = deformable_attention(
            value, spatial_shapes, places.to(value.dtype), weights.unflatten(-1, (levels, points))
        )
        return part.output_proj(sampled) + identity


def _number(like: Tensor, number: int) -> Tensor:
    """A scalar tensor of a number that depends on the images' size."""
    return torch.scalar_tensor(number, dtype=like.dtype, device=like.device)


def _replace_attention(detector: nn.Module) -> None:
    for part in list(detector.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, MultiScaleDeformableAttention):
                if not child.batch_first:
                    raise ValueError("a deformable attention whose batch is not first")
                setattr(part, name, _Attention(child))
