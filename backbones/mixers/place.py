"""Where in a model a token mixer stands."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """What a skeleton tells a mixer of the place that it is to fill.

    Attributes:
        dim: channels C, a multiple of `num_heads`.
        num_heads: heads, each of C / num_heads channels.
        size: (H, W) of the token map at the model's image size; learned tables have this shape,
            and are interpolated for other maps.
        stage, block: which stage, and which block of it; every other window is shifted.
        prefix_tokens: class tokens in front of the map's.
    """

    dim: int
    num_heads: int
    size: tuple[int, int]
    stage: int = 0
    block: int = 0
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim is {self.dim}, which num_heads = {self.num_heads} does not divide"
            )
