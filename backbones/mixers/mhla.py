"""Multi-head linear attention along the tokens (MHLA, arXiv:2601.07832, ICLR 2026)."""

import torch
import torch.nn.functional as F
from timm.layers import is_exporting
from torch import Tensor, nn

from ..context import Context, Place
from ..layers import DepthwiseConv2d
from ..norms import LayerNorm
from .base import TokenMixer, register_mixer
from .projected import rename_entries

EPSILON = 1e-6


class MixedStates(nn.Module):
    """Linear attention with a state per square of the map, and a matrix that mixes the states.

    With phi(x) = relu(x) + 1e-6, for the token at place w of square i, per head,

        S_j = sum_w phi(k_jw)^T v_jw, n_j = sum_w phi(k_jw)      the states of square j
        z_iw = sum_j A_ij phi(q_jw) . n_j                        the normaliser
        y_iw = phi(q_iw) sum_j A_ij S_j / (z_iw + 1e-6)

    so that the normaliser mixes products of the queries at the same place of all squares, as the
    authors' code does. There are as many squares for any map, which is padded with features of
    zero where they do not divide it; so the cost is linear in the number of tokens. The entries of
    A are kept within 0 and 1: training clamps them as the authors do after each step.

    Prefix tokens, which the paper does not have, lie in no square and are near to all: their state
    is added to the mixed state of every square, and they read the sum of all states.

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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """(B, P + H * W, C), each, to (B, P + H * W, C); the map is that of `context`."""
        query, key = query.relu() + EPSILON, key.relu() + EPSILON
        prefix = [x[:, : self.prefix_tokens] for x in (query, key, value)]
        query, key, value = (
            self.split(x[:, self.prefix_tokens :], context.size) for x in (query, key, value)
        )
        if self.training and self.mixing.requires_grad:
            with torch.no_grad():
                self.mixing.clamp_(0, 1)
        mixing = self.mixing.clamp(0, 1).to(value.dtype).expand(*value.shape[:2], -1, -1)
        states = key.transpose(-1, -2) @ value
        mixed = (mixing @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
        normaliser = mixing @ (query * key.sum(-2, keepdim=True)).sum(-1)
        if not self.prefix_tokens:
            return self.join(query @ mixed / (normaliser[..., None] + EPSILON), context.size)
        front, theirs, values = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in prefix
        )
        state, total = theirs.transpose(-1, -2) @ values, theirs.sum(-2, keepdim=True)
        normaliser = normaliser + (query * total[:, :, None]).sum(-1)
        y = query @ (mixed + state[:, :, None]) / (normaliser[..., None] + EPSILON)
        state, total = state + states.sum(2), total + key.sum((2, 3))[:, :, None]
        front = front @ state / ((front * total).sum(-1, keepdim=True) + EPSILON)
        return torch.cat((front.transpose(1, 2).flatten(2), self.join(y, context.size)), 1)

    def split(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) to squares (B, heads, squares^2, tokens of a square, D)."""
        x = x.unflatten(1, size)
        bottom, right = (-side % self.squares for side in size)
        # Comparing sizes would specialise the exported graph.
        if is_exporting() or bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        x = x.unflatten(3, (self.num_heads, -1))
        x = x.unflatten(2, (self.squares, -1)).unflatten(1, (self.squares, -1))
        return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)

    def join(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse of `split`."""
        width = -(-size[1] // self.squares)
        x = x.unflatten(3, (-1, width)).unflatten(2, (self.squares, self.squares))
        x = x.permute(0, 2, 4, 3, 5, 1, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        return x[:, : size[0], : size[1]].flatten(1, 2)


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
        self.query_norm = nn.RMSNorm(place.dim, eps=epsilon)
        self.key_norm = nn.RMSNorm(place.dim, eps=epsilon)
        self.attention = MixedStates(place, squares)
        self.local = DepthwiseConv2d(place.dim, 5)
        self.out_proj = nn.Linear(place.dim, place.dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        query, key, value = self.in_proj(self.norm(x)).chunk(3, -1)
        heads = (self.attention.num_heads, -1)
        query, key = (
            context.rotate(x.unflatten(-1, heads)).flatten(2)
            for x in (self.query_norm(query), self.key_norm(key))
        )
        y = self.attention(query, key, value, context)
        image = value[:, self.prefix_tokens :].unflatten(1, context.size)
        local = self.local(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        if self.prefix_tokens:
            local = F.pad(local, (0, 0, self.prefix_tokens, 0))
        return self.out_proj(y + local)

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
