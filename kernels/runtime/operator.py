"""The registration of an operator's Triton kernels with PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from .dispatch import SCALARS, is_direct_call
from .private import remember_accesses
from .tracing import can_show_kernels, show_launches

LIBRARY = torch.library.Library("linsight", "FRAGMENT")


class Operator:
    """The launch of Triton kernels, with its gradient, as one operator of PyTorch.

    With a schema, ``linsight::NAME`` is registered through `torch.library`, for `torch.compile`,
    `torch.export` and whatever else takes a program apart. A registered call costs the host 30 to
    130 us more than the launches of its kernels, as long as many of them run; so an eager call
    on plain tensors goes straight to the launch, inside an ordinary autograd function.

    AOTInductor sees through a registered operator to the launches of its kernels, as PyTorch's own
    `torch.library.triton_op` lets a compiler, and puts them into its packages.

    Without a schema only direct calls (`is_direct_call`) may come here: a compiler is to see the
    operator's reference, and fuses it with what stands around it.

    Args:
        name: of the operator.
        run: launches the kernels; on the CPU, under Triton's interpreter.
        save: ``save(ctx, inputs, output)`` keeps what the gradient needs.
        differentiate: ``differentiate(ctx, *gradients)`` returns a gradient or None per input.
        schema: arguments and results in PyTorch's language, such as ``(Tensor x) -> Tensor``.
        fake: the results of `run` as empty tensors, from shapes alone; needed with a schema.
        flops: floating-point operations of a call for `torch.utils.flop_counter`, two per
            multiply-add, from the shapes of its tensors and its other arguments. It counts the
            matrix products and convolutions of the reference, as PyTorch's counter would.
    """

    def __init__(
        self,
        name: str,
        run: Callable,
        save: Callable | None = None,
        differentiate: Callable | None = None,
        *,
        schema: str | None = None,
        fake: Callable | None = None,
        flops: Callable | None = None,
    ) -> None:
        self._run = run
        self._function = None
        self._registered = None
        if save is not None and differentiate is not None:
            self._function = _make_function(name, run, save, differentiate)
        if schema is None:
            return
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, run, "CUDA")
        LIBRARY.impl(name, run, "CPU")
        torch.library.register_fake(f"linsight::{name}", fake, lib=LIBRARY)
        if differentiate is not None:
            torch.library.register_autograd(
                f"linsight::{name}", differentiate, setup_context=save, lib=LIBRARY
            )
        torch.library.register_torch_dispatch(
            f"linsight::{name}", FunctionalTensorMode, self._decompose, lib=LIBRARY
        )
        packet = getattr(torch.ops.linsight, name)
        if flops is not None:
            register_flop_formula(packet)(flops)
        self._registered = packet.default

    def __call__(self, *args: Any) -> Any:
        if self._registered is not None and not is_direct_call(args):
            return self._registered(*args)
        if self._function is not None and torch.is_grad_enabled():
            for x in args:
                if type(x) not in SCALARS and isinstance(x, Tensor) and x.requires_grad:
                    return self._function.apply(*args)
        return self._run(*args)

    def _decompose(
        self, mode: FunctionalTensorMode, operator: Any, types: Any, args: tuple, kwargs: dict
    ) -> Any:
        """Trace the launches in place of the operator, where a compiler makes a graph."""
        if not can_show_kernels(args):
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        with mode, show_launches(), remember_accesses():
            return self._run(*args, **kwargs)


def _make_function(
    name: str, run: Callable, save: Callable, differentiate: Callable
) -> type[torch.autograd.Function]:
    def forward(ctx, *args):
        output = run(*args)
        save(ctx, args, output)
        return output

    methods = {
        "forward": staticmethod(forward),
        "backward": staticmethod(once_differentiable(differentiate)),
    }
    return type(name, (torch.autograd.Function,), methods)
