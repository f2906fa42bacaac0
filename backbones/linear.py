"""Linear layers whose weights are constants."""

from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.fx import Proxy

from ..kernels.linear import linear
from .tracing import record_call


class Linear(nn.Linear):
    """A linear layer that oneDNN may compute; `fuse()` of the module around it makes it.

    Folded models alone have it, because PyTorch's `quantize_dynamic` takes layers of the class
    `nn.Linear` itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        return linear(x, self.weight, self.bias)


# As a decorator it would hide the class from type checkers.
register_notrace_module(Linear)


def is_linear(layer: nn.Module | None) -> bool:
    """Whether a layer is PyTorch's own, or `Linear`, and no class that derives from either."""
    return type(layer) in (nn.Linear, Linear)


def fuse_linear(module: nn.Module) -> None:
    """Make every linear layer within a module a `Linear`, with its parameters and its hooks."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
