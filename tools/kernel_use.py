"""Which kernels the layers of a model run on a GPU, found out without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from linsight.backbones.checkpoint import TimmModel
from linsight.backbones.initialization import shapes_only
from linsight.kernels import force
from linsight.kernels.runtime.dispatch import observe_eager_kernels

# Functions of PyTorch in which a container of layers may spend its time.
ATTENTION, CONVOLUTION = "scaled_dot_product_attention", "conv2d"


@dataclass
class Use:
    """What a module's own code runs for an image, beside the modules within it.

    Attributes:
        registered: operators of `torch.ops.linsight`, whose kernels run in eager calls and
            compiled.
        eager: operators whose kernels run in eager calls; a compiler sees PyTorch functions.
        functions: names of functions of PyTorch, those of the eager operators' references
            included.
    """

    registered: set[str] = field(default_factory=set)
    eager: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)

    @property
    def operators(self) -> list[str]:
        """All operators with kernels."""
        return sorted(self.registered | self.eager)

    @property
    def heavy(self) -> list[str]:
        """The attention and the convolutions that run in PyTorch."""
        # The convolution of an eager operator's reference is its kernel's work.
        return sorted(self.functions & {ATTENTION, "" if self.eager else CONVOLUTION})


def record_kernel_use(
    name: str, size: tuple[int, int] | None = None, **arguments: Any
) -> tuple[nn.Module, dict[str, Use]]:
    """A model of timm, on the meta device, and what each of its modules runs in inference.

    Args:
        name: the model's name.
        size: height and width of the image, or None for the model's own.
        arguments: of the model.

    Returns:
        The model, and by the names of its modules what those run that run anything.

    Raises:
        RuntimeError: if Triton is not installed, or timm knows no model of that name.
        TypeError, ValueError: by the model, if it does not take the arguments.
    """
    with torch.device("meta"), force("triton"), torch.inference_mode():
        with shapes_only():
            model = cast(TimmModel, timm.create_model(name, **arguments)).eval()
        channels, *own = model.pretrained_cfg["input_size"]
        image = torch.empty(1, arguments.get("in_chans", channels), *(size or own))
        with _trace(model) as uses:
            model(image)
    return model, uses


@contextmanager
def _trace(model: nn.Module) -> Iterator[dict[str, Use]]:
    uses: dict[str, Use] = {}
    running: list[str] = [""]

    def use() -> Use:
        return uses.setdefault(running[-1], Use())

    hooks = []
    for name, module in model.named_modules():
        hooks += [
            module.register_forward_pre_hook(lambda *_, name=name: running.append(name)),
            module.register_forward_hook(lambda *_: running.pop() and None),
        ]

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            use().functions.add(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "linsight":
                use().registered.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    try:
        with observe_eager_kernels(lambda name: use().eager.add(name)), Functions(), Operators():
            yield uses
    finally:
        for hook in hooks:
            hook.remove()
