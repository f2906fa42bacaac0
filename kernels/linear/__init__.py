"""A linear layer's product by the library that computes it fastest: on x86 in inference, oneDNN.

PyTorch gives float32 products to MKL, which runs on AMD's processors without their AVX-512. On a
Zen 5 oneDNN takes half of its time, and with AVX2 nine tenths (docs/performance.md, "On a CPU").
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..runtime.dispatch import current_choice, is_direct_call

# PyTorch's compiler makes calls of this operator, which has neither a gradient nor a tangent.
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    and _PRODUCT is not None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, as `torch.nn.functional.linear` computes it.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    # The operator reads weights and biases of other strides slowly, or wrongly. On a GPU the first
    # question is the last: the host's time counts there.
    if (
        x.is_cpu
        and runs_onednn(x, weight, bias)
        and weight.is_contiguous()
        and (bias is None or bias.is_contiguous())
    ):
        return multiply(x, weight, bias)
    return F.linear(x, weight, bias)


def runs_onednn(*tensors: Tensor | None) -> bool:
    """Whether oneDNN may take a product: eager, in inference, of float32 tensors on an x86 CPU."""
    return (
        _HAS_ONEDNN
        and not torch.is_grad_enabled()
        and all(x is None or (x.is_cpu and x.dtype == torch.float32) for x in tensors)
        and torch.backends.mkldnn.enabled
        and current_choice() == "auto"
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and is_direct_call(tensors)
        and all(x is None or forward_ad.unpack_dual(x).tangent is None for x in tensors)
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, where `runs_onednn`; `weight` and `bias` are contiguous."""
    assert _PRODUCT is not None
    return _PRODUCT(x, weight, bias, "none", [], "")
