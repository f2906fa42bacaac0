"""Losses that a config names, with lists of numbers where a loss takes a tensor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn


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
        ValueError: something else is given, or a list has another length or numbers below 0.
    """
    settings, parameters = dict(settings), loss_parameters(settings)
    for name, value in settings.items():
        takes_tensor = name in parameters and "Tensor" in str(parameters[name].annotation)
        if not (takes_tensor or name == "class_weight") or isinstance(value, Tensor | None):
            continue
        numbers = value if isinstance(value, list | tuple) else ()
        if len(numbers) != num_classes:
            got = f"of {len(numbers)} numbers" if numbers else f"= {value!r}"
            raise ValueError(
                f"the loss {settings['type']} has {name} {got}, and there are {num_classes} "
                "classes: give a list of one number per class"
            )
        if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
            raise ValueError(
                f"the loss {settings['type']} has {name} = {value}: give numbers of 0 or more"
            )
        if takes_tensor:
            settings[name] = torch.tensor(numbers, dtype=torch.float32)
    loss = MODELS.build(settings)
    for module in loss.modules():
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, value, persistent=False)
    return loss
