"""What a token mixer is told: where it stands in the model, and which map a call is about."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.rotary import Rotary, apply_rotary, rotary_tables


@dataclass(frozen=True)
class Place:
    """The place in a model that a mixer is built for.

    Attributes:
        dim: channels C of the tokens, a multiple of `num_heads`.
        num_heads: number of attention heads, each of C / num_heads channels.
        size: (H, W) of the token map at the model's image size. Learned tables have this size
            and are interpolated for other maps.
        stage: index of the stage.
        block: index of the block within its stage; odd blocks shift their windows.
        prefix_tokens: number of class tokens in front of the map's tokens.
        rotary: whether the body's positions are rotary: a mixer rotates its queries and keys by
            `Context.rotate`, and in no other way.
        init_std: standard deviation of the truncated normal distribution from which the weights
            of linear layers are drawn, or None for PyTorch's own initialisation.
        fan_out: whether weights of convolutions are drawn from a normal distribution of variance
            2 / (k^2 O / groups), O their output channels, rather than by PyTorch.
    """

    dim: int
    num_heads: int
    size: tuple[int, int]
    stage: int = 0
    block: int = 0
    prefix_tokens: int = 0
    init_std: float | None = 0.02
    fan_out: bool = False
    rotary: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim is {self.dim}, which num_heads = {self.num_heads} does not divide: choose "
                "a width that is a multiple of the number of heads"
            )
        if self.rotary and self.dim // self.num_heads % 4:
            raise ValueError(
                f"dim is {self.dim} and num_heads {self.num_heads}, but rotary positions need "
                "heads of a multiple of 4 channels: choose another width or number of heads"
            )


@dataclass
class Context:
    """What the blocks of a stage share in one forward pass.

    Attributes:
        size: (H, W) of the token map.
        prefix_tokens: number of class tokens in front of the map's tokens.
        stream: the residual stream that the calling block has normalised to get its mixer's
            input, for mixers that read it, or None outside of a block.
        defers: whether a block may leave its last residual branch for the next one to add, which
            the caller of the blocks then finishes through `blocks.add_pending`.
        rotary_temperature: the temperature of the body's rotary positions, or None for a body
            whose positions are not rotary.
    """

    size: tuple[int, int]
    prefix_tokens: int = 0
    stream: Tensor | None = None
    defers: bool = False
    rotary_temperature: float | None = None

    def __post_init__(self) -> None:
        # These are no fields of the dataclass: torch.fx rebuilds a context from its fields.
        self.pending: tuple[Tensor, Tensor | None] | None = None
        self._tables: dict[tuple[int, torch.dtype, torch.device], Rotary] = {}

    def rotary(self, head_dim: int, like: Tensor) -> Rotary:
        """Rotary tables of this map, which are made at the first request and then shared.

        They are DINOv3's in a body whose positions are rotary, and RAVLT's elsewhere.

        Args:
            head_dim: channels per head, a multiple of 4.
            like: a tensor in the dtype and on the device of the tokens.
        """
        key = (head_dim, like.dtype, like.device)
        if key not in self._tables:
            self._tables[key] = rotary_tables(
                self.size, head_dim, like.dtype, like.device, self.rotary_temperature
            )
        return self._tables[key]

    def rotate(self, x: Tensor) -> Tensor:
        """Queries or keys, those of the map rotated by their places if the body's positions are
        rotary. Class tokens have no place, and stay as they are.

        Args:
            x: (B, P + H * W, heads, D).
        """
        if self.rotary_temperature is None:
            return x
        prefix, tokens = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        rotated = apply_rotary(tokens, self.rotary(x.shape[-1], x))
        return torch.cat((prefix, rotated), 1) if self.prefix_tokens else rotated

    def as_map(self, tokens: Tensor, what: str) -> Tensor:
        """Tokens (B, H * W, C) as a map (B, H, W, C), a view.

        Args:
            tokens: the map's tokens in row-major order.
            what: the layer that needs a map, for the message.

        Raises:
            ValueError: if there are class tokens, which have no place in a map.
        """
        if self.prefix_tokens:
            raise ValueError(
                f"{self.prefix_tokens} class tokens stand before the map, but {what} takes a map "
                "alone: choose another one for this stage, or a skeleton without class tokens"
            )
        # Around the method PyTorch has a function of Python.
        return torch.unflatten(tokens, 1, self.size)
