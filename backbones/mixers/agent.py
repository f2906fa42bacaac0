"""Agent attention (arXiv:2312.08874, ECCV 2024): pooled queries between queries and keys."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, trunc_normal_
from torch import Tensor, nn

from ...kernels.agent_attention import agent_attention
from ...kernels.runtime.dispatch import cache_constants, without_autocast
from ..context import Context, Place
from ..resampling import resampling
from .base import register_mixer
from .projected import PackedAttention, ProjectedMixer

# The side of the map on which the authors learn those tables that are interpolated at each call.
TABLE = 7


class AgentAttention(PackedAttention):
    """softmax(q a^T + B2) softmax(a k^T + B1) v + conv(v), with a the averages of q over cells.

    The biases B1, of agents to tokens, and B2, of tokens to agents, are sums of learned tables:
    one over a 7 x 7 map, one per row and one per column of the map, and one per class token. Each
    is interpolated to the map at hand.

    Args:
        place: where the mixer stands.
        agents: number of agents A, a square.
        agent_grid: rows and columns of the agents that run instead; see `Agent`.
        local_kernel: size of the depthwise convolution of the values, odd.
    """

    # There always is a local branch.
    local_weight: Tensor

    def __init__(
        self,
        place: Place,
        *,
        agents: int,
        agent_grid: int | tuple[int, int] | None,
        local_kernel: int,
    ) -> None:
        side = math.isqrt(agents)
        if side < 1 or side * side != agents:
            raise ValueError(f"agents is {agents}, expected a square such as 9, 16, 49 or 81")
        if local_kernel < 1:
            raise ValueError("local_kernel is 0, but agent attention always has a local branch")
        super().__init__(place, local_kernel)
        self.table_grid = (side, side)
        grid = agent_grid or side
        self.grid = (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])
        shape = (2, place.num_heads, agents)
        # Its rows and columns are one axis: `Module.to(memory_format=torch.channels_last)` takes no
        # parameter of rank 5.
        self.map_bias = nn.Parameter(torch.empty(*shape, TABLE * TABLE))
        self.row_bias = nn.Parameter(torch.empty(*shape, place.size[0]))
        self.column_bias = nn.Parameter(torch.empty(*shape, place.size[1]))
        self.prefix_bias = (
            nn.Parameter(torch.empty(*shape, place.prefix_tokens)) if place.prefix_tokens else None
        )
        # The biases for the model's own size, which `fuse()` computes from the tables.
        self.register_buffer("fused_biases", None)
        for table in (self.map_bias, self.row_bias, self.column_bias, self.prefix_bias):
            if table is not None:
                trunc_normal_(table, std=0.02)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the map at the model's image size."""
        return self.row_bias.shape[-1], self.column_bias.shape[-1]

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        return agent_attention(
            projection,
            self.biases(context.size),
            self.local_weight,
            self.local_bias,
            heads=self.num_heads,
            size=context.size,
            grid=self.grid,
        )

    def fuse(self) -> nn.Module:
        """This operator, with the biases of the model's own map size computed once."""
        with torch.no_grad():
            self.fused_biases = self.biases(self.size)
        return self

    def biases(self, size: tuple[int, int]) -> Tensor:
        """B1 and B2, both (heads, A, P + H * W), stacked: (2, heads, A, P + H * W)."""
        # Comparing sizes would specialise an exported graph, so an export always interpolates.
        if self.fused_biases is not None and not is_exporting() and tuple(size) == self.size:
            return self.fused_biases
        with without_autocast(self.map_bias):
            whole = self._for_grid(self.map_bias).unflatten(-1, (TABLE, TABLE))
            rows = resize_axis(self._for_grid(self.row_bias), size[0])
            columns = resize_axis(self._for_grid(self.column_bias), size[1])
            bias = resize_map(whole, size) + rows[..., :, None] + columns[..., None, :]
            if self.prefix_bias is None:
                return bias.flatten(-2)
            return torch.cat((self._for_grid(self.prefix_bias), bias.flatten(-2)), -1)

    def _for_grid(self, table: Tensor) -> Tensor:
        """A table (2, heads, A, L) for the agents that run, their grid resized as a map."""
        if self.grid == self.table_grid:
            return table
        maps = table.transpose(-1, -2).unflatten(-1, self.table_grid)
        return resize_map(maps, self.grid).flatten(-2).transpose(-1, -2)


@register_mixer("agent")
class Agent(ProjectedMixer):
    """Agent attention between projections; see `AgentAttention`.

    Args:
        place: where the mixer stands.
        agents: number of agents A, a square.
        agent_grid: rows and columns of agents that run instead (one number for both), the
            tables being interpolated from sqrt(A) x sqrt(A): more agents downstream than in
            pretraining. A tuple has one entry per stage, each a number or a pair.
        local_kernel: size of the depthwise convolution of the values, odd.

    Raises:
        ValueError: if `agents` is not a square, or there is no local branch.
    """

    attention: AgentAttention

    def __init__(
        self,
        place: Place,
        *,
        agents: int = 49,
        agent_grid: int | tuple[int, int] | None = None,
        local_kernel: int = 3,
    ) -> None:
        attention = AgentAttention(
            place, agents=agents, agent_grid=agent_grid, local_kernel=local_kernel
        )
        super().__init__(place, attention)

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' tables, packed, and interpolated where they are for another image size."""
        entries = pack_tables(super().convert_checkpoint(entries))
        for name in ("row_bias", "column_bias"):
            key = f"attention.{name}"
            shape = getattr(self.attention, name).shape
            value = entries.get(key)
            if value is not None and value.shape[:-1] == shape[:-1]:
                entries[key] = resize_axis(value.float(), shape[-1]).to(value.dtype)
        return entries

    def resize_tables(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """The biases of rows and columns; those of the 7 x 7 map are for every size."""
        if self.attention.fused_biases is not None:
            raise ValueError(
                "the tables of agent attention are folded for one image size: set the input size "
                "before reparameterize_model, on the model that it copies"
            )
        return {
            "attention.row_bias": resize_axis(self.attention.row_bias, size[0]),
            "attention.column_bias": resize_axis(self.attention.column_bias, size[1]),
        }


@cache_constants
def interpolation(length: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Linear interpolation of `length` values to `target`, as a matrix (length, target).

    The gradient of a product with it is the same in every run; on CUDA, `F.interpolate` sums its
    gradient by atomics.
    """
    if is_exporting():
        return resampling(length, target, "linear", False, dtype, device).T
    identity = torch.eye(length, dtype=dtype, device=device)
    return F.interpolate(identity[None], target, mode="linear")[0]


def resize_axis(table: Tensor, length: int) -> Tensor:
    """A table (..., L), linearly interpolated to (..., length)."""
    # Comparing sizes here would specialise the exported graph.
    if not is_exporting() and table.shape[-1] == length:
        return table
    return table @ interpolation(table.shape[-1], length, table.dtype, table.device)


def resize_map(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A table (..., h, w), bilinearly interpolated to (..., H, W)."""
    table = resize_axis(table, size[1])
    if not is_exporting() and table.shape[-2] == size[0]:
        return table
    return interpolation(table.shape[-2], size[0], table.dtype, table.device).T @ table


# The authors' tables for the first attention and for the second.
AUTHORS_TABLES = {
    "map_bias": ("an_bias", "na_bias"),
    "row_bias": ("ah_bias", "ha_bias"),
    "column_bias": ("aw_bias", "wa_bias"),
    "prefix_bias": ("ac_bias", "ca_bias"),
}


def pack_tables(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' bias tables of an agent attention, in pairs, as `AgentAttention` holds them.

    an, na (heads, A, 7, 7) become map_bias; ah (1, heads, A, H, 1) and ha (1, heads, H, 1, A)
    row_bias; aw (1, heads, A, 1, W) and wa (1, heads, 1, W, A) column_bias; ac (1, heads, A, 1)
    and ca (1, heads, 1, A) prefix_bias. Other entries pass through.
    """
    packed = dict(entries)
    for ours, (first, second) in AUTHORS_TABLES.items():
        if first not in packed or second not in packed:
            continue  # what is missing is named where the weights are loaded
        one, other = packed.pop(first), packed.pop(second)
        if ours == "map_bias":
            one, other = one.flatten(-2), other.flatten(-2)
        else:
            heads, agents = one.shape[1:3]
            one = one.reshape(heads, agents, -1)
            other = other.reshape(heads, -1, agents).transpose(1, 2)
        packed[f"attention.{ours}"] = torch.stack((one, other))
    return packed
