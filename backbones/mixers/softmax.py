"""Softmax attention over all tokens (arXiv:1706.03762), through PyTorch's fused kernels."""

import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from ...kernels.projected_softmax_attention import projected_softmax_attention
from ...kernels.rotary import Rotary
from .place import Place
from .projected import ProjectedMixer


@register_notrace_module
class Softmax(ProjectedMixer):
    """softmax(D^-0.5 q k^T) v, with q and k rotated where the skeleton gives rotary tables."""

    def attend(self, projection: Tensor, size: tuple[int, int], rotary: Rotary | None) -> Tensor:
        query, key, value, gate = self.unpack(projection, rotary)
        y = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)
        if (local := self.enhance(value, size)) is not None:
            y = y + local
        if gate is not None:
            y = y * gate
        return y.flatten(2)


@register_notrace_module
class GatedSoftmax(Softmax):
    """`Softmax` with the gate and the local branch that RAVLT and MAViT give it.

    With both, in eager calls on a GPU, q and k are rotated where `in_proj` wrote them.
    """

    def __init__(self, place: Place, *, gate: bool = True, local_kernel: int = 5) -> None:
        super().__init__(place, gate=gate, local_kernel=local_kernel)

    def attend(self, projection: Tensor, size: tuple[int, int], rotary: Rotary | None) -> Tensor:
        if not self.fused:
            return super().attend(projection, size, rotary)
        return projected_softmax_attention(
            projection.unflatten(1, size),
            self.local.weight,
            self.local.bias,
            heads=self.num_heads,
            rotary=rotary,
            overwrite=True,
        ).flatten(1, 2)
