"""Semantic segmentation on mmengine: a model of backbone, neck and heads, and its inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from linsight.backbones.checkpoint import check_fit, unwrap
from linsight.backbones.graphs import capture_training

from .backbone import TimmBackbone, convert_backbone
from .checkpoint import read_checkpoint
from .decode_head import resize
from .losses import build_loss, loss_parameters
from .segmentation_loss import PixelCrossEntropy


@MODELS.register_module()
class SemanticSegmentor(BaseModel):
    """A timm model, an optional neck, and heads, as mmengine trains them.

    Parts and weights have the names of mmsegmentation's EncoderDecoder. The model takes images
    that the data set's transforms have normalised, float (B, 3, H, W).

    Args:
        backbone: arguments of :class:`~linsight.heads.backbone.TimmBackbone`.
        decode_head: a head by its registered name; the channels and strides of its input maps are
            filled in.
        num_classes: number of classes.
        neck: a neck between backbone and head, by its registered name.
        auxiliary_head: a second head on the backbone's own maps, used in training alone.
        auxiliary_weight: weight of the second head's loss.
        loss: a function of logits (B, num_classes, H, W) in float32 and labels (B, H, W) that
            returns a scalar, by its registered name or by its import path in any library
            (``dict(type="segmentation_models_pytorch.losses.DiceLoss", mode="multiclass")``). The
            losses in a list are added. The default is cross-entropy.
        loss_weights: weights of the losses in a list.
        ignore_index: label of pixels that belong to no class. Losses that take one as an argument
            get it, and the data sets' must be the same.
        window: (height, width) of the windows in which images are predicted; None predicts whole
            images.
        window_stride: distance between windows, by default two thirds of the window. The logits
            of windows that overlap are averaged.
        test_scales: sizes, relative to the image, whose probabilities are averaged.
        test_flip: average the probabilities of the image and of its mirror image.
        checkpoint: file of initial weights of the whole model, linsight's or the authors'.
        compile: compile the parts in place; a dict holds arguments of ``torch.compile``.
        graph: on a GPU, and unless they are compiled, replay the parts' training passes from CUDA
            graphs (:func:`linsight.capture_training`).
        data_preprocessor: mmengine's data preprocessor; by default it moves the batch to the
            model's device.

    Raises:
        ValueError: an argument is out of its range.
        CheckpointError: the checkpoint does not fit the model.
    """

    def __init__(
        self,
        backbone: dict,
        decode_head: dict,
        num_classes: int,
        neck: dict | None = None,
        auxiliary_head: dict | None = None,
        auxiliary_weight: float = 0.4,
        loss: dict | Sequence[dict] | None = None,
        loss_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
        window: int | Sequence[int] | None = None,
        window_stride: int | Sequence[int] | None = None,
        test_scales: Sequence[float] = (1.0,),
        test_flip: bool = False,
        checkpoint: str | Path | None = None,
        compile: bool | dict = False,
        graph: bool = True,
        data_preprocessor: dict | nn.Module | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        if checkpoint is not None:  # it holds the backbone's weights, too
            backbone = {**backbone, "pretrained": False, "checkpoint": None}
        self.backbone = TimmBackbone(**backbone)
        channels = self.backbone.out_channels
        strides = self.backbone.out_strides
        if neck and neck["type"] == "SimpleFeaturePyramid":
            neck = {"in_stride": strides[-1], "strides": (4, 8, 16, 32), **neck}
        self.neck: Any = neck and MODELS.build({"in_channels": channels, **neck})
        strides = getattr(self.neck, "strides", strides)
        head = {"num_classes": num_classes, **decode_head}
        head.setdefault("in_channels", self.neck.out_channels if neck else channels)
        if head["type"] == "FPNHead":
            head.setdefault("feature_strides", strides)
        self.decode_head = MODELS.build(head)
        self.auxiliary_head: Any = auxiliary_head and MODELS.build(
            {"num_classes": num_classes, "in_channels": channels, **auxiliary_head}
        )
        self.auxiliary_weight = auxiliary_weight
        losses = [loss] if isinstance(loss, Mapping) else loss or [{"type": "PixelCrossEntropy"}]
        self.losses = nn.ModuleList(_build_loss(each, ignore_index, num_classes) for each in losses)
        self.loss_weights = list(loss_weights or [1.0] * len(self.losses))
        if len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights are {self.loss_weights}, for {len(self.losses)} losses")
        self.window = None if window is None else _pair("window", window)
        if self.window:
            stride = window_stride or [max(1, 2 * side // 3) for side in self.window]
            self.window_stride = _pair("window_stride", stride)
            if self.window_stride[0] > self.window[0] or self.window_stride[1] > self.window[1]:
                raise ValueError(
                    f"window_stride is {self.window_stride}, and would leave gaps between windows "
                    f"of {self.window}"
                )
        if not test_scales or min(test_scales) <= 0:
            raise ValueError(f"test_scales must be one or more above 0, got {tuple(test_scales)}")
        self.test_scales = tuple(test_scales)
        self.test_flip = test_flip
        for part in self._heads():
            # The backbones' maps are channels-last; the heads keep this memory format.
            part.to(memory_format=torch.channels_last)
        if checkpoint is not None:
            state = self.checkpoint_filter_fn(read_checkpoint(checkpoint))
            check_fit(state, self, f"checkpoint {checkpoint} does not fit the model")
            self.load_state_dict(state)
        for part in (self.backbone, *self._heads()):
            if compile:
                part.compile(**(compile if isinstance(compile, dict) else {}))
            elif graph:
                capture_training(part)

    def _heads(self) -> list[nn.Module]:
        return [m for m in (self.neck, self.decode_head, self.auxiliary_head) if m is not None]

    @property
    def classifiers(self) -> tuple[str, ...]:
        """Prefixes of the weights whose shapes depend on the number of classes."""
        return ("decode_head.conv_seg.", "auxiliary_head.conv_seg.")

    def checkpoint_filter_fn(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """Convert the names in a checkpoint of a paper's authors; linsight's own stay as they are.

        The heads have mmsegmentation's names in both. The backbone's weights go through the filter
        function of its family, and the authors' norms on its outputs
        (``extra_norms.0.norm.weight`` of RAVLT and MAViT, ``norm0.weight`` of Swin) become
        ``backbone.norms.0.weight``.

        Raises:
            CheckpointError: the backbone's weights are those of another model.
        """
        return convert_backbone(unwrap(state_dict), self.backbone)

    def init_weights(self) -> None:
        """Does nothing: the parts have been initialised, or loaded, on creation."""

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        mode: str = "tensor",
        size: Sequence[int] | None = None,
    ) -> Any:
        """Run the model in one of mmengine's modes.

        Args:
            inputs: normalised images (B, 3, H, W).
            labels: class indices (B, H', W'), which only the loss needs.
            mode: ``"tensor"`` returns logits (B, num_classes, H / 4, W / 4) at the size of the
                finest map, ``"predict"`` a list of ``dict(labels=(H', W'))``, and ``"loss"`` a
                dict of scalars.
            size: (H', W') of the predicted labels; by default the size of `labels` or, without
                them, of the images.

        Raises:
            ValueError: the mode is unknown.
        """
        if mode == "tensor":
            return self._decode(self.backbone(inputs))
        if mode == "loss":
            return self._loss(inputs, labels)
        if mode == "predict":
            if size is None:
                size = inputs.shape[-2:] if labels is None else labels.shape[-2:]
            return [{"labels": x} for x in self._predict(inputs, size)]
        raise ValueError(f"mode must be 'tensor', 'predict' or 'loss', got {mode!r}")

    def _decode(self, maps: Sequence[Tensor]) -> Tensor:
        return self.decode_head(self.neck(maps) if self.neck else maps)

    def _loss(self, inputs: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        if labels is None:
            raise ValueError("labels is None, but mode 'loss' needs them: pass labels (B, H, W)")
        labels = labels.long()
        maps = self.backbone(inputs)
        losses = {"decode.loss": self._measure(self._decode(maps), labels)}
        if self.auxiliary_head:
            auxiliary = self._measure(self.auxiliary_head(maps), labels)
            losses["auxiliary.loss"] = self.auxiliary_weight * auxiliary
        return losses

    def _measure(self, logits: Tensor, labels: Tensor) -> Tensor:
        # Interpolation and softmax sum many values, which half precision would round.
        logits = resize(logits.float(), labels.shape[-2:])
        # Losses of other libraries divide by the number of labelled pixels, here zero.
        foreign = any(not isinstance(loss, PixelCrossEntropy) for loss in self.losses)
        if foreign and not (labels != self.ignore_index).any():
            return 0 * logits.sum()
        weighted = (
            weight * loss(logits, labels)
            for weight, loss in zip(self.loss_weights, self.losses, strict=True)
        )
        return reduce(torch.add, weighted)

    def _predict(self, inputs: Tensor, size: Sequence[int]) -> Tensor:
        """Predict labels (B, H', W')."""
        views = list(self._views(inputs))
        if len(views) == 1:
            return resize(self._logits(inputs), size).argmax(1)
        (first, _), *others = views  # the first is never flipped
        total = resize(self._logits(first), size).softmax(1)
        for view, flipped in others:
            scores = resize(self._logits(view), size).softmax(1)
            total.add_(scores.flip(-1) if flipped else scores)
        return total.argmax(1)

    def _views(self, inputs: Tensor) -> Iterator[tuple[Tensor, bool]]:
        for scale in self.test_scales:
            size = [max(1, round(side * scale)) for side in inputs.shape[-2:]]
            view = resize(inputs, size)
            yield view, False
            if self.test_flip:
                yield view.flip(-1), True

    def _logits(self, inputs: Tensor) -> Tensor:
        """Compute float32 logits (B, num_classes, H, W) at the images' size."""
        height, width = inputs.shape[-2:]
        if self.window is None:
            return resize(self._decode(self.backbone(inputs)).float(), (height, width))
        rows, columns = (
            window_starts(*each)
            for each in zip((height, width), self.window, self.window_stride, strict=True)
        )
        total = inputs.new_zeros(len(inputs), self.num_classes, height, width, dtype=torch.float32)
        count = inputs.new_zeros(height, width, dtype=torch.float32)
        # Windows run one at a time, so that beyond the sum only one window needs memory.
        for y in rows:
            for x in columns:
                part = (..., slice(y, y + self.window[0]), slice(x, x + self.window[1]))
                view = inputs[part]
                logits = self._decode(self.backbone(view)).float()
                total[part] += resize(logits, view.shape[-2:])
                count[part] += 1
        return total.div_(count)


def _build_loss(settings: dict, ignore_index: int, num_classes: int) -> nn.Module:
    """Build a loss, and give it the label to ignore if it takes one as an argument.

    Raises:
        ValueError: the loss is to ignore another label.
    """
    if "ignore_index" in loss_parameters(settings):
        settings = {"ignore_index": ignore_index, **settings}
        if settings["ignore_index"] != ignore_index:
            raise ValueError(
                f"the loss {settings['type']} has ignore_index={settings['ignore_index']}, and the "
                f"model {ignore_index}: set model.ignore_index alone"
            )
    return build_loss(settings, num_classes)


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Starts of the windows along a side; the last window is moved back into the image."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(count)]


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be (height, width) of 1 or more, got {value}")
    return pair
