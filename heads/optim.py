"""timm's optimisers and parameter groups for mmengine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.optim import Muon, OptimInfo, param_groups_weight_decay
from timm.optim._optim_factory import default_registry
from torch import nn
from torch.overrides import TorchFunctionMode


class _Float32Casts(TorchFunctionMode):
    """Casts to bfloat16 give float32."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        options = dict(options or {})
        if options.get("dtype") is torch.bfloat16:
            options["dtype"] = torch.float32
        return function(*arguments, **options)


class Float32Muon(Muon):
    """timm's Muon, whose Newton-Schulz iteration runs in float32 in place of bfloat16.

    A processor without instructions for bfloat16 takes four times as long for a product of
    bfloat16 matrices, and the optimiser then longer than forward and backward of a small model.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters, as `timm.optim.Muon` does."""
        with _Float32Casts():
            return super().step(closure)


default_registry.register(
    OptimInfo(
        "nmuon32",
        Float32Muon,
        "timm's nmuon, with Newton-Schulz in float32",
        has_momentum=True,
        has_betas=True,
        defaults={"nesterov": True},
    )
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor:
    """Build the optimiser with :func:`timm.optim.create_optimizer_v2`.

    ::

        optim_wrapper = dict(
            constructor="TimmOptimWrapperConstructor",
            optimizer=dict(opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75),
        )

    ``optimizer`` holds the arguments of that function, whose rules for parameter groups apply:
    tensors of rank 1 or less, biases, and the names that ``no_weight_decay()`` of the model or of
    its parts lists have no weight decay. ``layer_decay`` is for models that consist of a backbone
    alone, and orders the layers by the backbone's ``group_matcher()``.

    Raises:
        ValueError: ``paramwise_cfg`` is given, or ``layer_decay`` for a model with other parts.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if paramwise_cfg is not None:
            raise ValueError(
                "optim_wrapper.paramwise_cfg belongs to mmengine's constructor; with "
                "TimmOptimWrapperConstructor, put layer_decay and the like into "
                "optim_wrapper.optimizer"
            )
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = self.wrapper.pop("optimizer")

    def __call__(self, model: Any) -> OptimWrapper:
        model = model.module if is_model_wrapper(model) else model
        beside = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.startswith("backbone.")
        ]
        if not beside:
            optimizer = timm.optim.create_optimizer_v2(model.backbone, **self.optimizer)
        elif self.optimizer.get("layer_decay") is not None:
            raise ValueError(
                "optim_wrapper.optimizer.layer_decay orders the layers of a backbone, and this "
                f"model has other parameters: {', '.join(beside[:3])}"
            )
        else:
            optimizer = timm.optim.create_optimizer_v2(
                model, **self.optimizer, param_group_fn=self._groups
            )
        # timm's schedulers multiply the rate by the layer's factor at each step. mmengine's
        # schedulers keep the ratio between groups that they find at the start.
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        return OPTIM_WRAPPERS.build(
            {"type": "OptimWrapper", **self.wrapper, "optimizer": optimizer}
        )

    def _groups(self, model: nn.Module) -> list[dict]:
        undecayed = []
        for part, module in model.named_modules():
            no_weight_decay = getattr(module, "no_weight_decay", set)
            undecayed += (f"{part}.{name}" for name in no_weight_decay())
        return param_groups_weight_decay(
            model, self.optimizer.get("weight_decay", 0.0), no_weight_decay_list=undecayed
        )
