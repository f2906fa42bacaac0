"""The frame of most mixers: packed input projection, an attention operator, output projection."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ...kernels.depthwise_conv2d import depthwise_conv2d
from ..context import Context, Place
from ..initialization import init_convolutions
from ..norms import fold_into_linear
from .base import TokenMixer


class ProjectedMixer(TokenMixer):
    """out_proj(attention(in_proj(x), context)).

    Args:
        place: where the mixer stands.
        attention: one leaf module, called with the packed projection (B, P + H * W, blocks * C)
            and the context. It owns what its operator needs besides, such as the kernels of a
            local branch or bias tables.
        blocks: how many blocks of C channels the projection packs: 3 for q, k and v, 4 with a gate.
    """

    # How many of the projection's blocks, from the first one, are queries or keys.
    rotated_blocks: ClassVar[int] = 2

    def __init__(self, place: Place, attention: nn.Module, *, blocks: int = 3) -> None:
        super().__init__()
        self.in_proj = nn.Linear(place.dim, blocks * place.dim)
        self.attention = attention
        self.out_proj = nn.Linear(place.dim, place.dim)
        self.num_heads = place.num_heads
        self.rotary = place.rotary and self.rotated_blocks > 0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.out_proj(self.attention(self.project(x, context), context))

    def project(self, x: Tensor, context: Context) -> Tensor:
        """The packed projection of tokens, whose queries and keys are rotated in a body with rotary
        positions; see `Context.rotate`."""
        projection = self.in_proj(x)
        if not self.rotary:
            return projection
        channels = self.rotated_blocks * self.out_proj.in_features
        # To the rotation, keys are further heads of queries.
        heads = projection[..., :channels].unflatten(-1, (self.rotated_blocks * self.num_heads, -1))
        return torch.cat((context.rotate(heads).flatten(2), projection[..., channels:]), -1)

    def absorb_norm(self, norm: nn.Module) -> nn.Module:
        return fold_into_linear(norm, self.in_proj)

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `qkv` (or `q` and `kv`), `proj` and local branch, renamed."""
        return rename_entries(
            join_projections(entries), dict.fromkeys(LOCAL_NAMES, "attention.local_")
        )


# The authors' names of the projections, and of a depthwise convolution of the values.
PROJECTION_NAMES = {"qkv.": "in_proj.", "qkvo.": "in_proj.", "proj.": "out_proj."}
LOCAL_NAMES = ("lepe.", "dwc.", "get_v.")


def join_projections(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mixer's entries, with `q` and `kv` joined to one `qkv`."""
    entries = dict(entries)
    for kind in ("weight", "bias"):
        if f"q.{kind}" in entries and f"kv.{kind}" in entries:
            parts = (entries.pop(f"q.{kind}"), entries.pop(f"kv.{kind}"))
            entries[f"qkv.{kind}"] = torch.cat(parts)
    return entries


def rename_entries(entries: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """A mixer's entries, with the authors' names replaced by this library's.

    Args:
        entries: the authors' entries, or this library's, which pass through.
        names: beginnings of names, besides the projections', and what replaces them.
    """
    names = PROJECTION_NAMES | names

    def rename(name: str) -> str:
        for theirs, ours in names.items():
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name

    return {rename(name): value for name, value in entries.items()}


def depthwise_parameters(place: Place, channels: int, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Weight (C, 1, k, k) and bias (C,) of a depthwise convolution that an operator owns."""
    conv = nn.Conv2d(channels, channels, kernel_size, groups=channels)
    if place.fan_out:
        init_convolutions(conv)
    return conv.weight, conv.get_parameter("bias")


class PackedAttention(nn.Module):
    """What attention operators on a packed projection share: heads and a local branch.

    Args:
        place: where the mixer stands.
        local_kernel: size k of a depthwise convolution of the values that is added to the result
            (the papers' locally enhanced positional encoding), odd; 0 for no convolution.
    """

    def __init__(self, place: Place, local_kernel: int = 0) -> None:
        super().__init__()
        self.num_heads = place.num_heads
        self.head_dim = place.dim // place.num_heads
        self.prefix_tokens = place.prefix_tokens
        self.local_weight = self.local_bias = None
        if local_kernel:
            self.local_weight, self.local_bias = depthwise_parameters(
                place, place.dim, local_kernel
            )

    def init_local(self) -> None:
        """Initialise the local branch as RAVLT's and MAViT's code initialises convolutions."""
        if self.local_weight is not None and self.local_bias is not None:
            trunc_normal_(self.local_weight, std=0.02)
            nn.init.zeros_(self.local_bias)

    def extra_repr(self) -> str:
        kernel = 0 if self.local_weight is None else self.local_weight.shape[-1]
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, local_kernel={kernel}"

    def local_filters(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (C, 1, k, k) and bias (C,) of the local branch, or None if there is none."""
        return None if self.local_weight is None else (self.local_weight, self.local_bias)

    def local_branch(self, value: Tensor, size: tuple[int, int]) -> Tensor | None:
        """The convolution of the values (B, N, heads, D), zero at class tokens, or None."""
        filters = self.local_filters()
        if filters is None:
            return None
        tokens = value.flatten(2)[:, self.prefix_tokens :].unflatten(1, size)
        local = depthwise_conv2d(tokens, *filters).flatten(1, 2)
        if self.prefix_tokens:
            local = F.pad(local, (0, 0, self.prefix_tokens, 0))
        return local.unflatten(-1, (self.num_heads, -1))
