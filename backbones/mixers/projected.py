"""The frame of a token mixer: packed input projection, attention, output projection."""

from abc import abstractmethod

from torch import Tensor, nn

from ...kernels import Rotary
from ..layers import DepthwiseConv2d


class ProjectedMixer(nn.Module):
    """out_proj(attend(q, k, v)), with q, k, v (and a gate) read in place from one projection.

    Subclasses say how tokens attend to each other. Every mixer is called the same way, so
    that any skeleton can hold it: ``mixer(x, size, rotary)``.

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_heads: heads of width D = C / num_heads.
        gate: project a fourth block that multiplies the result, linearly.
        local_kernel: size k of a depthwise convolution of the values that is added to the
            result (the papers' locally enhanced position encoding); 0 for none.

    Raises:
        ValueError: if `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, gate: bool = False, local_kernel: int = 0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim is {dim}, which num_heads = {num_heads} does not divide")
        self.num_heads = num_heads
        self.gate = gate
        self.in_proj = nn.Linear(dim, (4 if gate else 3) * dim)
        self.local = DepthwiseConv2d(dim, local_kernel) if local_kernel else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int], rotary: Rotary | None = None) -> Tensor:
        """Mix the tokens of a map.

        Args:
            x: (B, H * W, C), tokens in row-major order.
            size: (H, W).
            rotary: tables of `linsight.kernels.rotary_tables` for that size, or none.

        Returns:
            (B, H * W, C).
        """
        packed = self.in_proj(x).unflatten(-1, (-1, self.num_heads, x.shape[-1] // self.num_heads))
        query, key, value, *gate = packed.unbind(2)
        local = None
        if self.local is not None:
            local = self.local(value.flatten(2).unflatten(1, size)).view(value.shape)
        y = self.attend(query, key, value, rotary, local, gate[0] if gate else None)
        return self.out_proj(y.flatten(2))

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: Rotary | None,
        local: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        """(attention + local) * gate; all tensors are (B, N, heads, D)."""
