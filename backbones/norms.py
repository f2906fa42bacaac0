"""Normalisation over the channels of tokens (..., C), and how a `norm_layer` is named."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_norm_layer
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels.layer_norm import add_layer_norm, layer_norm

# A class, a partial of one, or a name; called with the number of channels.
NormLayer = str | Callable[..., nn.Module]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over channels, in the dtype of its input even under autocast.

    Called with a branch, it computes the residual sum as well, in the same pass over memory.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x), or the pair (s, norm(s)) with s = x + scale * branch.

        Args:
            x: (..., C).
            branch: a residual branch of the shape of `x`, or None.
            scale: the branch's layer scale, of C elements, or None for 1.
        """
        if branch is None:
            return layer_norm(x, self.weight, self.bias, eps=self.eps)
        scale = None if scale is None else scale.flatten()
        return add_layer_norm(x, branch, self.weight, self.bias, scale=scale, eps=self.eps)


# A call, because as a decorator it hides the class from type checkers.
register_notrace_module(LayerNorm)


class PRepBN(nn.Module):
    """Progressive re-parameterised batch normalisation (SLAB, arXiv:2405.11582, eqs. 4 and 5).

    lambda * LayerNorm(x) + (1 - lambda) * (BatchNorm(x) + alpha * x), with lambda = 1 - progress
    in training and 0 in evaluation. The training loop moves `progress` from 0 to 1 through
    `set_progress`; counting forward passes would count twice under gradient checkpointing. All of
    it is one module, because a layer norm of its own would never run in evaluation.

    Args:
        channels: C.
        eps: added to the variance of the layer norm.
        batch_eps: added to the variance of the batch norm.
        momentum: weight of a batch's statistics in the running ones.
    """

    running_mean: Tensor
    running_var: Tensor
    progress: Tensor

    def __init__(
        self, channels: int, eps: float = 1e-6, batch_eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.eps, self.batch_eps, self.momentum = eps, batch_eps, momentum
        self.layer_weight = nn.Parameter(torch.ones(channels))
        self.layer_bias = nn.Parameter(torch.zeros(channels))
        self.batch_weight = nn.Parameter(torch.ones(channels))
        self.batch_bias = nn.Parameter(torch.zeros(channels))
        self.alpha = nn.Parameter(torch.ones(1))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("progress", torch.zeros(()))

    def set_progress(self, progress: float) -> None:
        """Tell how far training is, from 0 (layer norm) to 1 (batch norm).

        Raises:
            ValueError: if `progress` is not within 0 and 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}, expected a fraction from 0 to 1")
        self.progress.fill_(progress)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        batch = F.batch_norm(
            x.reshape(-1, x.shape[-1]),
            self.running_mean,
            self.running_var,
            self.batch_weight,
            self.batch_bias,
            self.training,
            self.momentum,
            self.batch_eps,
        ).view(x.shape)
        batch = batch + self.alpha.to(x.dtype) * x
        if not self.training:
            return batch
        layer = F.layer_norm(x, x.shape[-1:], self.layer_weight, self.layer_bias, self.eps)
        mixed = torch.lerp(layer, batch.to(layer.dtype), self.progress.to(layer.dtype))
        return mixed.to(x.dtype)


def set_training_progress(model: nn.Module, progress: float) -> None:
    """Tell every layer of `model` that changes with training how far training is.

    Args:
        model: any module; layers with a method `set_progress` are told.
        progress: the fraction of training that is done, from 0 to 1.
    """
    for module in model.modules():
        set_progress = getattr(module, "set_progress", None)
        if set_progress is not None:
            set_progress(progress)


NORMS: dict[str, Callable[..., nn.Module]] = {"layernorm": LayerNorm, "prepbn": PRepBN}


def resolve_norm_layer(norm_layer: NormLayer | None, default: Any) -> Callable[..., nn.Module]:
    """The callable that makes a norm from a number of channels.

    Args:
        norm_layer: a key of `NORMS`, one of timm's names (such as 'rmsnorm'), a class or a
            partial of one whose modules take (..., C), or None for the default.
        default: the skeleton's own norm.

    Raises:
        ValueError: if there is no norm of that name.
    """
    if norm_layer is None:
        return default
    if not isinstance(norm_layer, str):
        return norm_layer
    name = norm_layer.replace("_", "").lower()
    if name in NORMS:
        return NORMS[name]
    try:
        found = get_norm_layer(name)
    except KeyError:
        found = None
    if found is None:
        raise ValueError(
            f"norm_layer is {norm_layer!r}, which is neither one of {', '.join(NORMS)} nor a norm "
            "of timm: give such a name, a class or a partial"
        )
    return found
