"""The frame of a token mixer: packed input projection, attention, output projection."""

from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.rotary import Rotary, apply_rotary
from ..layers import DepthwiseConv2d, Linear
from .place import Place


class ProjectedMixer(nn.Module):
    """out_proj(attend(in_proj(x))), where one projection packs q, k, v and, if asked, a gate.

    Subclasses say how tokens attend to each other. Every mixer is called the same way, so
    that any skeleton can hold it: ``mixer(x, size, rotary, scale)``.

    Args:
        place: where the mixer stands.
        gate: project a fourth block that multiplies the result, linearly.
        local_kernel: size k of a depthwise convolution of the values that is added to the
            result (the papers' locally enhanced position encoding); 0 for none.
    """

    def __init__(self, place: Place, *, gate: bool = False, local_kernel: int = 0) -> None:
        super().__init__()
        dim = place.dim
        self.num_heads = place.num_heads
        self.prefix_tokens = place.prefix_tokens
        self.in_proj = Linear(dim, (4 if gate else 3) * dim)
        self.local = DepthwiseConv2d(dim, local_kernel) if local_kernel else None
        self.out_proj = Linear(dim, dim)
        # Whether one operator can do all that stands between the projections.
        self.fused = gate and local_kernel > 0 and not place.prefix_tokens

    def forward(
        self,
        x: Tensor,
        size: tuple[int, int],
        rotary: Rotary | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of a map.

        Args:
            x: (B, P + H * W, C), P class tokens and then the map's in row-major order.
            size: (H, W).
            rotary: tables of `linsight.kernels.rotary_tables` for that size, or none, as for
                a mixer with class tokens, which have no place in the map.
            scale: a layer scale of C elements that multiplies the result, or none.

        Returns:
            (B, P + H * W, C).
        """
        return self.out_proj(self.attend(self.in_proj(x), size, rotary), scale)

    @abstractmethod
    def attend(self, projection: Tensor, size: tuple[int, int], rotary: Rotary | None) -> Tensor:
        """(attention + local) * gate, (B, N, C), of the packed blocks (B, N, 3 or 4 C)."""

    def unpack(
        self, projection: Tensor, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and gate (or none), (B, N, heads, D); query and key rotated.

        What a mixer uses of the projection it takes from here: a slice of its own would have a
        gradient of the whole projection's size.
        """
        width = self.out_proj.in_features // self.num_heads
        blocks = projection.unflatten(-1, (-1, self.num_heads, width))
        if rotary is None:
            query, key, value, *gate = blocks.unbind(2)
        else:
            # Beside each other in the projection, query and key turn in one pass.
            both, value, *gate = blocks.split((2, *[1] * (blocks.shape[2] - 2)), 2)
            query, key = apply_rotary(both.flatten(2, 3), rotary).chunk(2, 2)
            value, *gate = (block.squeeze(2) for block in (value, *gate))
        return query, key, value, gate[0] if gate else None

    def enhance(self, value: Tensor, size: tuple[int, int]) -> Tensor | None:
        """The local branch of the values, (B, N, heads, D), zero at class tokens; or none."""
        if self.local is None:
            return None
        tokens = value.flatten(2)[:, self.prefix_tokens :]
        local = self.local(tokens.unflatten(1, size)).flatten(1, 2)
        if self.prefix_tokens:
            local = F.pad(local, (0, 0, self.prefix_tokens, 0))
        return local.unflatten(-1, (self.num_heads, -1))
