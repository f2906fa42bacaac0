"""Losses that a config names, with lists of numbers where a loss takes a tensor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn


def loss_parameters(settings: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a loss that is named as for :func:`build_loss`; none if it is unknown."""
    kind = MODELS.get(settings["type"]) if isinstance(settings["type"], str) else settings["type"]
    return inspect.signature(kind).parameters if kind else {}


def build_loss(settings: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Build a loss by its registered name or its import path.

    A config holds numbers, and losses such as ``CrossEntropyLoss(weight=...)`` take a tensor: a
    list for an argument that is annotated as one becomes a tensor. Such tensors move with the
    model, and are not part of its checkpoints.

    Args:
        settings: the loss as ``type``, and its arguments.
        num_classes: number of classes, which the list must have as its length.

    Raises:
        ValueError: a list has another length.
    """
    settings, parameters = dict(settings), loss_parameters(settings)
    for name, value in settings.items():
        takes_tensor = name in parameters and "Tensor" in str(parameters[name].annotation)
        if not takes_tensor or not isinstance(value, list | tuple):
            continue
        if len(value) != num_classes:
            raise ValueError(
                f"the loss {settings['type']} has {name} of {len(value)} numbers, and there are "
                f"{num_classes} classes: give one number per class"
            )
        settings[name] = torch.tensor(value, dtype=torch.float32)
    loss = MODELS.build(settings)
    for module in loss.modules():
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, value, persistent=False)
    return loss
