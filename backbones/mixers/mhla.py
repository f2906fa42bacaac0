"""Multi-head linear attention along the tokens (MHLA, arXiv:2601.07832, ICLR 2026)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.mixed_state_attention import mixed_state_attention
from ..context import Context, Place
from ..layers import DepthwiseConv2d
from ..norms import LayerNorm, RMSNorm
from .base import TokenMixer, register_mixer
from .projected import rename_entries


class MixedStates(nn.Module):
    """`mixed_state_attention`, and the matrix A that mixes the states of the squares.

    The entries of A are kept within 0 and 1: training clamps them as the authors do after each
    step.

    Args:
        place: where the mixer stands.
        squares: number of squares per side of the map.
    """

    def __init__(self, place: Place, squares: int) -> None:
        super().__init__()
        self.num_heads = place.num_heads
        self.prefix_tokens = place.prefix_tokens
        self.squares = squares
        self.mixing = nn.Parameter(nearness(squares))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, squares={self.squares}"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, local: Tensor, context: Context
    ) -> Tensor:
        """The attention of (B, P + H * W, heads, D), plus `local`; the map is that of `context`."""
        if self.training and self.mixing.requires_grad:
            with torch.no_grad():
                self.mixing.clamp_(0, 1)
        return mixed_state_attention(
            query,
            key,
            value,
            self.mixing.clamp(0, 1),
            context.size,
            local=local,
            prefix_tokens=self.prefix_tokens,
        )


@register_mixer("mhla")
class MHLA(TokenMixer):
    """`MixedStates` of normalised queries and keys, with a local branch, between projections.

    The queries and keys have root-mean-square norms over all channels, before heads are cut, and
    the input a layer norm of its own, beyond that of the block.

    Args:
        place: where the mixer stands.
        squares: number of squares per side of the map.
    """

    def __init__(self, place: Place, *, squares: int = 4) -> None:
        super().__init__()
        self.prefix_tokens = place.prefix_tokens
        # In float32 it is PyTorch's own choice, which depends on the dtype.
        epsilon = torch.finfo(torch.float32).eps
        self.norm = LayerNorm(place.dim, eps=1e-5)
        self.in_proj = nn.Linear(place.dim, 3 * place.dim, bias=False)
        self.query_norm = RMSNorm(place.dim, eps=epsilon)
        self.key_norm = RMSNorm(place.dim, eps=epsilon)
        self.attention = MixedStates(place, squares)
        self.local = DepthwiseConv2d(place.dim, 5)
        self.out_proj = nn.Linear(place.dim, place.dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        query, key, value = self.in_proj(self.norm(x)).chunk(3, -1)
        image = value[:, self.prefix_tokens :].unflatten(1, context.size)
        local = self.local(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        if self.prefix_tokens:
            local = F.pad(local, (0, 0, self.prefix_tokens, 0))
        query, key, value, local = (
            x.unflatten(-1, (self.attention.num_heads, -1))
            for x in (self.query_norm(query), self.key_norm(key), value, local)
        )
        y = self.attention(context.rotate(query), context.rotate(key), value, local, context)
        return self.out_proj(y.flatten(2))

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' layers, renamed, and their mixing (M, M, 1, 1) as a matrix."""
        names = {
            "to_qkv.": "in_proj.",
            "to_out.0.": "out_proj.",
            "q_norm.": "query_norm.",
            "k_norm.": "key_norm.",
            "lepe.": "local.",
            "piece_attn.conv.weight": "attention.mixing",
        }
        entries = rename_entries(entries, names)
        if (mixing := entries.get("attention.mixing")) is not None:
            entries["attention.mixing"] = mixing.flatten(1)
        return entries


def nearness(squares: int) -> Tensor:
    """The initial mixing (M, M): 1 for a square itself, 0 for the farthest, columns summing to 1.

    Args:
        squares: number of squares per side of the map, M = squares^2.
    """
    place = torch.arange(squares, dtype=torch.float32)
    places = torch.cartesian_prod(place, place)
    distances = torch.cdist(places, places)
    near = 1 - distances / distances.max().clamp(min=1)
    return near / near.sum(0, keepdim=True)
