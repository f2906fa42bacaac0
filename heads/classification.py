"""Image classification on mmengine: the model around a timm backbone."""

from __future__ import annotations

from typing import Any, cast

import timm.data
import timm.loss
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from ..backbones.graphs import capture_training
from ..data.augmentation import Views, augment
from ..data.loading import DataError
from .backbone import create_backbone, keep_frozen
from .distillation import Distillation
from .losses import build_loss, loss_parameters

for _loss in (
    nn.CrossEntropyLoss,
    timm.loss.LabelSmoothingCrossEntropy,
    timm.loss.SoftTargetCrossEntropy,
    timm.loss.BinaryCrossEntropy,
):
    if _loss.__name__ not in MODELS.module_dict:
        MODELS.register_module(module=_loss)


@MODELS.register_module()
class LabelledImages(BaseDataPreprocessor):
    """Moves a batch to the model's device after a check of its labels.

    Streamed data sets do not check their labels. Images whose data set has
    ``augment_on_device=True`` are augmented and normalised there, by
    :func:`~linsight.data.augmentation.augment`.

    Args:
        num_classes: number of classes.
        non_blocking: do not wait for the device when a batch is copied to it.

    Raises:
        DataError: a batch has a label that belongs to no class.
    """

    def __init__(self, num_classes: int, non_blocking: bool = True) -> None:
        super().__init__(non_blocking)
        self.num_classes = num_classes

    def cast_data(self, data: Any) -> Any:
        """The batch, or a part of it, on the device."""
        return augment(data, self.device) if isinstance(data, Views) else super().cast_data(data)

    def forward(self, data: Any, training: bool = False) -> Any:
        labels = data.get("labels") if isinstance(data, dict) else data[-1]
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            outside = labels[(labels < 0) | (labels >= self.num_classes)]
            if len(outside):
                raise DataError(
                    f"a batch has the label {outside[0]}, and the model has {self.num_classes} "
                    f"classes: labels are 0 to {self.num_classes - 1}; number the classes so in "
                    "the data set, or set model.num_classes"
                )
        return super().forward(data, training)


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A timm model for classification, as mmengine trains it.

    It takes images that the data set's transform has normalised, float (B, C, H, W).

    Args:
        backbone: arguments of :func:`timm.create_model`, its first as ``model_name``,
            ``checkpoint``, a file of initial weights, and ``frozen_stages``, see
            :func:`~linsight.heads.backbone.freeze_stages`.
        num_classes: number of classes.
        loss: a loss by its registered name, ``dict(type="BinaryCrossEntropy", ...)``. The default
            is that of timm's training script: cross-entropy with soft targets under Mixup,
            otherwise cross-entropy with ``label_smoothing``. A list is a
            tensor where the loss takes one: ``dict(type="CrossEntropyLoss", weight=[1.0, 5.0])``.
        mixup: arguments of :class:`timm.data.Mixup`, applied to each training batch.
        erasing: arguments of timm's ``RandomErasing``, applied to each training batch after Mixup,
            the order of timm's prefetching loader. A data set's transform erases before Mixup.
        label_smoothing: smoothing of the targets, with and without Mixup. A `loss` of one's own
            gets it as its ``label_smoothing`` or ``smoothing``.
        distillation: arguments of :class:`~linsight.heads.distillation.Distillation`, whose loss on
            a teacher's logits is added. A backbone with two classifiers, a distilled DeiT, gives
            the second one's logits to it; any other gives the only ones.
        compile: compile the backbone in place; a dict holds arguments of ``torch.compile``.
        graph: on a GPU, and unless it is compiled, replay the backbone's training passes from CUDA
            graphs (:func:`linsight.capture_training`).
        data_preprocessor: mmengine's data preprocessor; by default :class:`LabelledImages`.
    """

    def __init__(
        self,
        backbone: dict,
        num_classes: int,
        loss: dict | None = None,
        mixup: dict | None = None,
        erasing: dict | None = None,
        label_smoothing: float = 0.0,
        distillation: dict | None = None,
        compile: bool | dict = False,
        graph: bool = True,
        data_preprocessor: dict | nn.Module | None = None,
    ) -> None:
        if data_preprocessor is None:
            data_preprocessor = {"type": "LabelledImages", "num_classes": num_classes}
        super().__init__(data_preprocessor)
        self.num_classes = num_classes
        self.backbone = create_backbone(**backbone, num_classes=num_classes)
        self.mixup: Any = mixup and timm.data.Mixup(
            **mixup, num_classes=num_classes, label_smoothing=label_smoothing
        )
        self.erasing: Any = erasing and RandomErasing(**erasing)
        # Not by a name, which means mmdet's loss after a detector was trained in this process.
        if loss is None:
            loss = {"type": timm.loss.SoftTargetCrossEntropy if self.mixup else nn.CrossEntropyLoss}
        if label_smoothing and not self.mixup:
            loss = _smooth(loss, label_smoothing)
        self.loss = build_loss(loss, num_classes)
        if distillation and "teacher" not in distillation:
            raise ValueError("model.distillation has no teacher: give one by --teacher MODEL")
        self.distillation: Any = distillation and Distillation(
            **distillation, num_classes=num_classes
        )
        if self.distillation and hasattr(self.backbone, "set_distilled_training"):
            cast(Any, self.backbone).set_distilled_training(True)
        if compile:
            self.backbone.compile(**(compile if isinstance(compile, dict) else {}))
        elif graph:
            capture_training(self.backbone)

    def init_weights(self) -> None:
        """Does nothing: timm has initialised the model, or loaded its weights, on creation."""

    def train(self, mode: bool = True) -> ImageClassifier:
        """Set the mode of the modules that are not frozen; frozen modules stay in evaluation."""
        super().train(mode)
        keep_frozen(self.backbone)
        return self

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        """Run the model in one of mmengine's modes.

        Args:
            inputs: normalised images (B, C, H, W).
            labels: class indices (B,), which only the loss needs.
            mode: ``"tensor"`` returns logits (B, num_classes), ``"predict"`` a list of
                ``dict(scores=(num_classes,))`` with probabilities, and ``"loss"`` a dict with the
                scalar ``loss``.

        Raises:
            ValueError: the mode is unknown, or Mixup gets an odd number of images.
        """
        if mode == "loss":
            if self.mixup:
                inputs, labels = cast(Any, self._mix)(inputs, labels)
            if self.erasing:
                inputs = cast(Any, self._erase)(inputs)
            logits = self.backbone(inputs)
            if not self.distillation:
                return {"loss": self.loss(logits.float(), labels)}
            first, second = logits if isinstance(logits, tuple) else (logits, logits)
            taught = self.distillation(second.float(), inputs)
            share = self.distillation.weight
            return {"loss": (1 - share) * self.loss(first.float(), labels) + share * taught}
        logits = self.backbone(inputs)
        if mode == "tensor":
            return logits
        if mode == "predict":
            return [{"scores": scores} for scores in logits.float().softmax(-1)]
        raise ValueError(f"mode must be 'tensor', 'predict' or 'loss', got {mode!r}")

    @torch.compiler.disable
    def _erase(self, inputs: Tensor) -> Tensor:
        self.erasing.device = inputs.device
        return self.erasing(inputs)

    # Mixup draws from numpy's generator, which torch.compile would replace by another one.
    @torch.compiler.disable
    def _mix(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(inputs) % 2:
            raise ValueError(
                f"mixup pairs the images of a batch, and this batch has {len(inputs)}: set "
                "train_dataloader.drop_last=True and an even train_dataloader.batch_size"
            )
        return self.mixup(inputs, labels)


def _smooth(loss: dict, smoothing: float) -> dict:
    """The settings of a loss with the smoothing of its targets.

    Raises:
        ValueError: the loss smooths no targets, or by another amount.
    """
    names = loss_parameters(loss)
    name = next((name for name in ("label_smoothing", "smoothing") if name in names), None)
    if name is None or loss.get(name, smoothing) != smoothing:
        raise ValueError(
            f"label_smoothing is {smoothing}, and the loss {loss['type']} "
            + (f"has {name}={loss[name]}" if name else "smooths no targets")
            + ": leave out model.label_smoothing, or change model.loss"
        )
    return {**loss, name: smoothing}
