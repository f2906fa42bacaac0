"""Normalisation over the channels of tokens (..., C), and how a `norm_layer` is named."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from timm.layers import get_norm_layer
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from ..kernels.batch_norm import batch_norm
from ..kernels.layer_norm import add_layer_norm, layer_norm, rms_norm
from .linear import is_linear
from .tracing import record_call

# A class, a partial of one, or a name; called with the number of channels.
NormLayer = str | Callable[..., nn.Module]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over channels, in the dtype of its input even under autocast.

    Called with a branch, it computes the residual sum as well, in the same pass over memory.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        scale: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x), or the pair (s, norm(s)) with s = x + keep * scale * branch.

        Args:
            x: (..., C).
            branch: a residual branch of the shape of `x`, or None.
            scale: the branch's layer scale, of C elements, or None for 1.
            keep: the branch's factor for each image, (B, 1, ..., 1), or None for 1.
        """
        if isinstance(x, Proxy):
            return record_call(self, x, branch, scale)
        if branch is None:
            return layer_norm(x, self.weight, self.bias, eps=self.eps)
        scale = None if scale is None else scale.flatten()
        vectors = self.weight, self.bias
        return add_layer_norm(x, branch, *vectors, scale=scale, keep=keep, eps=self.eps)


# A call, because as a decorator it hides the class from type checkers.
register_notrace_module(LayerNorm)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over channels, in the dtype of its input even under autocast.

    Args:
        channels: C.
        eps: added to the mean square.
    """

    eps: float

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return rms_norm(x, self.weight, eps=self.eps)


# The authors' names of the parts of a norm.
AUTHORS_NAMES = {
    "norm1.weight": "layer_weight",
    "norm1.bias": "layer_bias",
    "bn.weight": "batch_weight",
    "bn.bias": "batch_bias",
    "bn.running_mean": "running_mean",
    "bn.running_var": "running_var",
}


class RepBN(nn.Module):
    """Re-parameterised batch normalisation (SLAB, arXiv:2405.11582, eq. 5).

    BatchNorm(x) + alpha * x, with one learned scalar alpha. In evaluation it is an affine map per
    channel, which `fuse()` of the layers around it merges into a linear layer or a convolution.

    Args:
        channels: C.
        batch_eps: added to the variance of the batch norm.
        momentum: weight of a batch's statistics in the running ones.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, batch_eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features = channels
        self.batch_eps, self.momentum = batch_eps, momentum
        self.batch_weight = nn.Parameter(torch.ones(channels))
        self.batch_bias = nn.Parameter(torch.zeros(channels))
        self.alpha = nn.Parameter(torch.ones(1))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def extra_repr(self) -> str:
        return f"{self.num_features}, batch_eps={self.batch_eps}, momentum={self.momentum}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        if self.training:
            return self.batch_norm(x, self.batch_weight, self.batch_bias, self.alpha)
        # alpha * x is a part of what the batch norm computes with other weights.
        deviation = (self.running_var + self.batch_eps).sqrt()
        weight = self.batch_weight + self.alpha * deviation
        bias = self.batch_bias + self.alpha * self.running_mean
        return self.batch_norm(x, weight, bias)

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        alpha: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """The batch norm of x (..., C) with the given weights, plus alpha * x and `addend`.

        Training moves its statistics.
        """

        def view(y: Tensor) -> Tensor:
            return y.reshape(1, -1, 1, y.shape[-1]).permute(0, 3, 1, 2)

        y = batch_norm(
            view(x),
            weight,
            bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.batch_eps,
            residual=None if alpha is None else alpha.expand(x.shape[-1]),
            addend=None if addend is None else view(addend),
        )
        return y.permute(0, 2, 3, 1).reshape(x.shape)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) that the norm applies in evaluation."""
        with torch.no_grad():
            scale = self.batch_weight * (self.running_var + self.batch_eps).rsqrt()
            return scale + self.alpha, self.batch_bias - self.running_mean * scale

    def fuse(self) -> nn.Module:
        """The affine map that this norm is in evaluation, where no other layer can take it in."""
        return ChannelAffine(*self.affine())

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entries of this norm in the authors' files, or in this library's.

        The authors' norm has `alpha` and `bn`; their progressive norm has a layer norm `norm1`,
        which is not used in evaluation, beside these two in `norm2`. What this norm does not
        have, such as the numbers of passes that their code counts, is left out.
        """
        names = (name.removeprefix("norm2.") for name in entries)
        names = (AUTHORS_NAMES.get(name, name) for name in names)
        own = self.state_dict()
        return {
            name: value for name, value in zip(names, entries.values(), strict=True) if name in own
        }


class PRepBN(RepBN):
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

    progress: Tensor

    def __init__(
        self, channels: int, eps: float = 1e-6, batch_eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(channels, batch_eps, momentum)
        self.eps = eps
        self.layer_weight = nn.Parameter(torch.ones(channels))
        self.layer_bias = nn.Parameter(torch.zeros(channels))
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
        if not self.training or isinstance(x, Proxy):
            return super().forward(x)
        # The shares multiply the weights, which are smaller than what they make.
        share = 1 - self.progress
        layer = layer_norm(x, share * self.layer_weight, share * self.layer_bias, eps=self.eps)
        weight, bias = self.progress * self.batch_weight, self.progress * self.batch_bias
        return self.batch_norm(x, weight, bias, self.progress * self.alpha, layer)

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `RepBN`. In the authors' files the layer norm has faded out, or does not exist."""
        entries = super().convert_checkpoint(entries)
        if not entries or "progress" in entries:
            return entries
        return {
            "layer_weight": torch.ones_like(self.layer_weight),
            "layer_bias": torch.zeros_like(self.layer_bias),
            "progress": torch.ones_like(self.progress),
            **entries,
        }


# Layers that normalise by statistics of the batch in training, and by running ones in evaluation.
BATCH_NORMS = (_BatchNorm, RepBN)


class ChannelAffine(nn.Module):
    """scale * x + shift per channel: a norm in evaluation, its constants computed once.

    Args:
        scale, shift: (C,).
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.shift = nn.Parameter(shift, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C), in the dtype of x."""
        return torch.addcmul(self.shift, x, self.scale).to(x.dtype)


# Calls, because as decorators they would hide the classes from type checkers.
for leaf in (RepBN, PRepBN):
    register_notrace_module(leaf)


def is_plain(layer: nn.Module | None, kind: type[nn.Module] = nn.Linear) -> TypeGuard[Any]:
    """Whether a layer is of the class `kind` itself, and its weight can be changed in place.

    Linear layers are so before and after they are folded. A weight that is quantised, or that a
    hook computes anew at each call, cannot be changed.
    """
    own = is_linear(layer) if kind is nn.Linear else type(layer) is kind
    return own and type(getattr(layer, "weight", None)) is nn.Parameter


def fold_into_linear(norm: nn.Module, layer: nn.Module | None) -> nn.Module:
    """Multiply a `RepBN`, as it is in evaluation, into the linear layer after it, in place.

    Returns:
        What takes the norm's place: the identity, or the norm itself if one of the two is of
        another class.
    """
    if not isinstance(norm, RepBN) or not is_plain(layer):
        return norm
    scale, shift = norm.affine()
    with torch.no_grad():
        bias = layer.weight @ shift
        if layer.bias is None:
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.add_(bias)
        layer.weight.mul_(scale)
    return nn.Identity()


def fold_into_convolution(norm: nn.Module, conv: nn.Module) -> nn.Module:
    """Multiply a `RepBN`, as it is in evaluation, into the convolution before it, in place.

    Returns:
        What takes the norm's place: the identity, or the norm itself if one of the two is of
        another class.
    """
    if not isinstance(norm, RepBN) or not isinstance(conv, nn.Conv2d) or conv.bias is None:
        return norm
    if not is_plain(conv, type(conv)):
        return norm
    scale, shift = norm.affine()
    with torch.no_grad():
        conv.weight.mul_(scale[:, None, None, None])
        conv.bias.mul_(scale).add_(shift)
    return nn.Identity()


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


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layernorm": LayerNorm,
    "prepbn": PRepBN,
    "repbn": RepBN,
}


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
