"""Softmax attention over all tokens (arXiv:1706.03762), through PyTorch's fused kernels."""

import torch
from torch import Tensor, nn

from ...kernels.projected_softmax_attention import projected_softmax_attention
from ...kernels.rotary import apply_rotary
from ...kernels.runtime.private import has_forward_hooks
from ..context import Context, Place
from .attention_map import attend, make_attention_drop
from .base import register_mixer
from .projected import PackedAttention, ProjectedMixer


class SoftmaxAttention(PackedAttention):
    """(softmax(D^-0.5 q k^T) v + conv(v)) * gate of a packed projection.

    Args:
        place: where the mixer stands.
        gate: whether the projection's fourth block multiplies the result.
        local_kernel: see `PackedAttention`.
        rotary: whether to rotate q and k by their tokens' positions in the map. In a place with
            class tokens, or in a body that rotates q and k itself, this does nothing.
        clip: alpha and zeta of a clipped softmax; see `attend`.
    """

    def __init__(
        self,
        place: Place,
        *,
        gate: bool = False,
        local_kernel: int = 0,
        rotary: bool = False,
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(place, local_kernel)
        self.clip = clip
        self.rotary = rotary and not (place.prefix_tokens or place.rotary)
        # With a local branch, one operator then computes all that stands between projections.
        self.packed = gate and not place.prefix_tokens
        self.attn_drop = make_attention_drop()

    def forward(self, projection: Tensor, context: Context, overwrite: bool = False) -> Tensor:
        """The attention of a projection; if `overwrite`, q and k may be rotated in it in place."""
        rotary = context.rotary(self.head_dim, projection) if self.rotary else None
        weight = self.local_weight if self.packed and self.attn_drop is None else None
        if weight is not None:
            return projected_softmax_attention(
                torch.unflatten(projection, 1, context.size),
                weight,
                self.local_bias,
                heads=self.num_heads,
                rotary=rotary,
                overwrite=overwrite,
            ).flatten(1, 2)
        blocks = projection.unflatten(-1, (-1, self.num_heads, self.head_dim))
        query, key, value, *gate = blocks.unbind(2)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        y = attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            self.attn_drop,
            self.clip,
        ).transpose(1, 2)
        local = self.local_branch(value, context.size)
        if local is not None:
            y = y + local
        if gate:
            y = y * gate[0]
        return y.flatten(2)


@register_mixer("softmax")
class Softmax(ProjectedMixer):
    """softmax(D^-0.5 q k^T) v between projections.

    `clip_alpha` and `head_gate` let a head attend to nothing, for which it otherwise learns
    activations so large that eight bits hold little else (arXiv:2306.12929). They are for training:
    a model that was trained without them computes something else with them.

    Args:
        place: where the mixer stands.
        rotary: whether to rotate q and k by their tokens' positions in the map.
        clip_alpha, clip_zeta: of a clipped softmax, clamp((zeta - gamma) softmax + gamma, 0, 1)
            with gamma = -alpha / N of N tokens; the paper's are 4 and 1. The attention map is then
            in memory. With 0 and 1 it is the softmax itself.
        head_gate: whether a linear layer of the input, through a sigmoid, multiplies each head's
            result.

    Raises:
        ValueError: alpha is below 0, or zeta below 1.
    """

    def __init__(
        self,
        place: Place,
        *,
        rotary: bool = False,
        clip_alpha: float = 0.0,
        clip_zeta: float = 1.0,
        head_gate: bool = False,
    ) -> None:
        if clip_alpha < 0 or clip_zeta < 1:
            raise ValueError(
                f"clip_alpha is {clip_alpha} and clip_zeta {clip_zeta}, expected 0 or more and "
                "1 or more, such as 4.0 and 1.0"
            )
        clip = (clip_alpha, clip_zeta) if (clip_alpha, clip_zeta) != (0, 1) else None
        super().__init__(place, SoftmaxAttention(place, rotary=rotary, clip=clip))
        self.head_gate = nn.Linear(place.dim, place.num_heads) if head_gate else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.attention(self.project(x, context), context)
        if self.head_gate is not None:
            gate = self.head_gate(x).sigmoid()[..., None]
            y = (y.unflatten(-1, (gate.shape[-2], -1)) * gate).flatten(-2)
        return self.out_proj(y)

    def absorb_norm(self, norm: nn.Module) -> nn.Module:
        return super().absorb_norm(norm) if self.head_gate is None else norm


@register_mixer("gated_softmax")
class GatedSoftmax(ProjectedMixer):
    """`Softmax` with the rotation, the gate and the local branch of RAVLT and MAViT.

    Args:
        place: where the mixer stands.
        gate: whether to project a fourth block, which multiplies the result.
        local_kernel: size of the depthwise convolution of the values, odd; 0 for no convolution.
    """

    attention: SoftmaxAttention

    def __init__(self, place: Place, *, gate: bool = True, local_kernel: int = 5) -> None:
        attention = SoftmaxAttention(place, gate=gate, local_kernel=local_kernel, rotary=True)
        super().__init__(place, attention, blocks=4 if gate else 3)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        # A hook on the input projection may keep its output, which must then stay as it is.
        overwrite = not has_forward_hooks(self.in_proj)
        return self.out_proj(self.attention(self.project(x, context), context, overwrite))

    def init_weights(self, place: Place) -> None:
        super().init_weights(place)
        self.attention.init_local()
