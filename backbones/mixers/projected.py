"""The frame of a token mixer: packed input projection, attention, output projection."""

from abc import abstractmethod

from torch import Tensor, nn

from ...kernels import Rotary
from ..layers import DepthwiseConv2d


class ProjectedMixer(nn.Module):
    """out_proj(attend(in_proj(x))), where one projection packs q, k, v and, if asked, a gate.

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
        projection = self.in_proj(x).unflatten(1, size)
        return self.out_proj(self.attend(projection, rotary).flatten(1, 2))

    @abstractmethod
    def attend(self, projection: Tensor, rotary: Rotary | None) -> Tensor:
        """(attention + local) * gate, (B, H, W, C), of the packed blocks (B, H, W, 3 or 4 C)."""

    def unpack(self, projection: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and gate (or none) as views (B, N, heads, D)."""
        width = self.out_proj.in_features // self.num_heads
        blocks = projection.flatten(1, 2).unflatten(-1, (-1, self.num_heads, width)).unbind(2)
        return blocks if len(blocks) == 4 else (*blocks, None)

    def enhance(self, projection: Tensor) -> Tensor | None:
        """The local branch of the values, (B, N, heads, D), or none."""
        if self.local is None:
            return None
        dim = self.out_proj.in_features
        local = self.local(projection[..., 2 * dim : 3 * dim])
        return local.flatten(1, 2).unflatten(-1, (self.num_heads, -1))
