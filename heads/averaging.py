"""Moving averages of the weights, of all weights in a few launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import HOOKS, MODELS
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .sharding import distribute_on_load, local


@MODELS.register_module()
class FusedExponentialMovingAverage(ExponentialMovingAverage):
    """mmengine's exponential moving average, computed by PyTorch's operators on lists of tensors.

    ::

        custom_hooks = [dict(type="EMAHook", ema_type="FusedExponentialMovingAverage")]

    At each step average = (1 - momentum) * average + momentum * weight. mmengine launches one
    kernel per weight and one per buffer. Arguments, results and checkpoints are those of mmengine's
    class. The average of a fully sharded model is sharded as well; it holds tensors alone and
    cannot be called.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: torch.device | None = None,
        update_buffers: bool = False,
    ) -> None:
        # mmengine copies the model, and PyTorch refuses to copy one that is sharded.
        sharded = isinstance(model, FSDPModule)
        source = _tensors_of(model) if sharded else model
        super().__init__(source, momentum, interval, device, update_buffers)
        if sharded:
            distribute_on_load(self.module)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take one step; the first one copies the weights."""
        sources = model.state_dict() if self.update_buffers else dict(model.named_parameters())
        pairs = [(average, sources[name]) for name, average in self.avg_parameters.items()]
        if self.steps == 0:
            for averages, values in _group(pairs):
                torch._foreach_copy_(averages, values)
        elif self.steps % self.interval == 0:
            for averages, values in _group(pairs):
                if averages[0].is_floating_point():
                    get_ema_multi_avg_fn(1 - self.momentum)(averages, values, self.steps)
        if not self.update_buffers:
            for copies, values in _group(zip(self.module.buffers(), model.buffers(), strict=True)):
                torch._foreach_copy_(copies, values)
        self.steps += 1


@HOOKS.register_module()
class BatchScaledEMAHook(EMAHook):
    """An exponential moving average of the weights that reaches as many images at any batch size.

    At each iteration average = d * average + (1 - d) * weight, with d = decay ** (batch /
    base_batch_size), where `batch` counts the images of one iteration on all devices.

    Args:
        decay: the decay per iteration of `base_batch_size` images, between 0 and 1.
        base_batch_size: the batch that `decay` is for.
        **options: further arguments of mmengine's ``EMAHook``.
    """

    def __init__(self, decay: float, base_batch_size: int, **options: Any) -> None:
        options = {"ema_type": "FusedExponentialMovingAverage", **options}
        super().__init__(**options)
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}, expected a number between 0 and 1, such as 0.9999")
        self.decay, self.base_batch_size = decay, base_batch_size

    def before_run(self, runner: Any) -> None:
        """Make the average, with the decay of this run's batch."""
        # In testing there is no loop, and to make one would read the training data.
        if not isinstance(runner._train_loop, dict | None):
            batch = runner.train_dataloader.batch_size * get_world_size()
            self.ema_cfg["momentum"] = 1 - self.decay ** (batch / self.base_batch_size)
        super().before_run(runner)


def _group(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Lists of averages and of values, one pair of lists per device and dtype."""
    groups = defaultdict(lambda: ([], []))
    for average, value in pairs:
        averages, values = groups[average.device, average.dtype]
        averages.append(local(average))
        values.append(local(value).to(average.device))
    return list(groups.values())


def _tensors_of(module: nn.Module) -> nn.Module:
    """A tree of empty modules with the weights and buffers of a module under their names."""
    tree = nn.Module()
    for name, weight in module.named_parameters(recurse=False):
        tree.register_parameter(name, weight)
    for name, buffer in module.named_buffers(recurse=False):
        persistent = name not in module._non_persistent_buffers_set
        tree.register_buffer(name, buffer, persistent=persistent)
    for name, child in module.named_children():
        tree.add_module(name, _tensors_of(child))
    return tree
