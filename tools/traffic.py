"""What a pass of a model moves through a GPU's memory, counted without a GPU.

::

    python -m linsight.tools.traffic rala_vit_small --training

Each kernel of this library, and each operator of PyTorch, counts the bytes of the tensors that it
is given and of those that it returns. What a kernel reads again from the caches is not counted, nor
what a matrix product reads more than once. PyTorch's convolutions are those of the machine that
counts: without cuDNN their results are copied into the channels-last format.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, cast

import timm
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linsight.backbones.checkpoint import TimmModel
from linsight.backbones.initialization import shapes_only
from linsight.kernels.runtime.compilation import collect_variants
from linsight.kernels.runtime.launch import Launch, observe_launches
from linsight.kernels.runtime.private import make_target, pretend_target
from linsight.kernels.runtime.rehearsal import Pass, rehearse

_ATEN = torch.ops.aten
# Operators that move nothing, beside those that are registered as views.
_MOVE_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "_unsafe_view", "_reshape_alias"),
}


class Traffic(TorchDispatchMode):
    """A context that counts calls and bytes, by the names of kernels and operators.

    Attributes:
        calls, moved: the counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        results = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if operator.namespace != "prim" and not operator.is_view and name not in _MOVE_NOTHING:
            self._add(f"{operator.namespace}::{name}", tree_leaves((args, kwargs, results)))
        return results

    def add_launch(self, kernel: Any, how: Launch, code: Any, args: tuple) -> None:
        """Count a launch of a kernel."""
        module = kernel.fn.__module__.split(".")[-2]
        self._add(f"{module}.{kernel.fn.__name__.lstrip('_')}", args)

    def _add(self, name: str, values: Any) -> None:
        tensors = {id(x): x for x in values if isinstance(x, Tensor)}
        self.calls[name] += 1
        for x in tensors.values():
            self.moved[name] += x.numel() * x.element_size()


class _FlashAttention(TorchFunctionMode):
    """Softmax attention as the one kernel that a GPU has for it, which a CPU would not choose."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        narrow = function is F.scaled_dot_product_attention and args[0].dtype.itemsize == 2
        if narrow and len(args) == 3 and kwargs.get("attn_mask") is None:
            options = {key: value for key, value in kwargs.items() if key in ("dropout_p", "scale")}
            return _ATEN._scaled_dot_product_flash_attention(*args, **options)[0]
        return function(*args, **kwargs)


def count_traffic(
    name: str,
    training: bool = False,
    batch_size: int = 64,
    side: int | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Traffic:
    """Count what a pass of a model of timm moves on a GPU as an H100.

    Args:
        name: the model's name.
        training: whether with the backward pass, and in training mode.
        batch_size, side: of the square images; None for the model's own size.
        dtype: of autocast, or None without it.
    """
    with shapes_only():
        model = cast(TimmModel, timm.create_model(name))
    channels, *size = model.pretrained_cfg["input_size"]
    shape = (batch_size, channels, *((side, side) if side else size))
    how = Pass(shape, torch.float32, training, training, dtype, torch.device("cuda", 0))
    traffic = Traffic()
    with (
        pretend_target(make_target("sm_90")),
        collect_variants(lambda variant: None),
        observe_launches(traffic.add_launch),
        _FlashAttention(),
    ):
        rehearse(model, how, traffic)
    return traffic


def main(
    model: Annotated[str, typer.Argument(help="A model of timm.")],
    training: Annotated[bool, typer.Option("--training", help="With the backward pass.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    resolution: Annotated[int | None, typer.Option(help="The side of the images.")] = None,
    rows: Annotated[int, typer.Option(help="The kernels with the most bytes.", min=1)] = 20,
) -> None:
    """Print what a pass of a model moves through the GPU's memory, in bfloat16."""
    traffic = count_traffic(model, training, batch_size, resolution)
    total = sum(traffic.moved.values())
    table = Table("", *(Column(name, justify="right") for name in ("calls", "MiB", "%")))
    for name, moved in traffic.moved.most_common(rows):
        table.add_row(
            name, f"{traffic.calls[name]:,}", f"{moved / 2**20:,.0f}", f"{moved / total:.1%}"
        )
    table.add_section()
    table.add_row("all", f"{sum(traffic.calls.values()):,}", f"{total / 2**20:,.0f}", "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
