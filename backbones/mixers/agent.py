"""Agent attention (arXiv:2312.08874, ECCV 2024): pooled queries between queries and keys."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from ...kernels.agent_attention import agent_attention
from ...kernels.rotary import Rotary
from ...kernels.runtime.dispatch import cache_constants, without_autocast
from .place import Place
from .projected import ProjectedMixer

# The side of the map on which the authors learn the tables that are resized in every forward.
TABLE = 7


@register_notrace_module
class Agent(ProjectedMixer):
    """softmax(q a^T + B2) softmax(a k^T + B1) v, with a the adaptive averages of q over the map.

    The biases B1, of agents to tokens, and B2, of tokens to agents, are sums of learned tables:
    one over a 7 x 7 map, one a row and one a column of the map, and one a class token. Each is
    interpolated to the map at hand. Rotary tables, where the skeleton gives them, are not used.

    Args:
        place: where the mixer stands.
        agents: number of agents A, a square.
        agent_grid: rows and columns of agents that run instead (one number for both), the
            tables being interpolated from sqrt(A) x sqrt(A): more agents downstream than in
            pretraining. A tuple has one entry a stage, each a number or a pair.
        local_kernel: size of the depthwise convolution of the values, odd.

    Raises:
        ValueError: if `agents` is not a square, or there is no local branch.
    """

    def __init__(
        self,
        place: Place,
        *,
        agents: int = 49,
        agent_grid: int | tuple[int, int] | None = None,
        local_kernel: int = 3,
    ) -> None:
        side = math.isqrt(agents)
        if side < 1 or side * side != agents:
            raise ValueError(f"agents is {agents}, expected a square such as 9, 16, 49 or 81")
        if local_kernel < 1:
            raise ValueError("local_kernel is 0, but agent attention is not without local branch")
        super().__init__(place, local_kernel=local_kernel)
        self.size = tuple(place.size)
        self.table_grid = (side, side)
        grid = agent_grid or side
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        shape = (2, place.num_heads, agents)
        self.map_bias = nn.Parameter(torch.empty(*shape, TABLE, TABLE))
        self.row_bias = nn.Parameter(torch.empty(*shape, self.size[0]))
        self.column_bias = nn.Parameter(torch.empty(*shape, self.size[1]))
        self.prefix_bias = (
            nn.Parameter(torch.empty(*shape, place.prefix_tokens)) if place.prefix_tokens else None
        )
        for table in (self.map_bias, self.row_bias, self.column_bias, self.prefix_bias):
            if table is not None:
                trunc_normal_(table, std=0.02)

    def biases(self, size: tuple[int, int]) -> Tensor:
        """B1 and B2, both (heads, A, P + H * W), stacked: (2, heads, A, P + H * W)."""
        with without_autocast(self.map_bias):
            whole = self._of_grid(self.map_bias.flatten(-2)).unflatten(-1, (TABLE, TABLE))
            rows = resize_axis(self._of_grid(self.row_bias), size[0])
            columns = resize_axis(self._of_grid(self.column_bias), size[1])
            bias = resize_map(whole, size) + rows[..., :, None] + columns[..., None, :]
            if self.prefix_bias is None:
                return bias.flatten(-2)
            return torch.cat((self._of_grid(self.prefix_bias), bias.flatten(-2)), -1)

    def _of_grid(self, table: Tensor) -> Tensor:
        """A table (2, heads, A, L) for the agents that run, their grid resized as a map."""
        if self.grid == self.table_grid:
            return table
        maps = table.transpose(-1, -2).unflatten(-1, self.table_grid)
        return resize_map(maps, self.grid).flatten(-2).transpose(-1, -2)

    @staticmethod
    def fit_tables(
        state_dict: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """The authors' tables packed; rows and columns of another image size interpolated."""
        return {
            name: resize_axis(value.float(), shapes[name][-1]).to(value.dtype)
            if name.endswith((".row_bias", ".column_bias"))
            and name in shapes
            and value.shape[:-1] == shapes[name][:-1]
            else value
            for name, value in pack_tables(state_dict).items()
        }

    def attend(self, projection: Tensor, size: tuple[int, int], rotary: Rotary | None) -> Tensor:
        return agent_attention(
            projection,
            self.biases(size),
            self.local.weight,
            self.local.bias,
            heads=self.num_heads,
            size=size,
            grid=self.grid,
        )


@cache_constants
def interpolation(length: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Linear interpolation of `length` values to `target`, as a matrix (length, target).

    A product with it has a gradient that is the same in every run; that of `F.interpolate` is
    summed by atomics on CUDA.
    """
    identity = torch.eye(length, dtype=dtype, device=device)
    return F.interpolate(identity[None], target, mode="linear")[0]


def resize_axis(table: Tensor, length: int) -> Tensor:
    """A table (..., L), linearly interpolated to (..., length)."""
    # A comparison of sizes would fix an exported graph's.
    if not is_exporting() and table.shape[-1] == length:
        return table
    return table @ interpolation(table.shape[-1], length, table.dtype, table.device)


def resize_map(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A table (..., h, w), bilinearly interpolated to (..., H, W)."""
    table = resize_axis(table, size[1])
    if not is_exporting() and table.shape[-2] == size[0]:
        return table
    return interpolation(table.shape[-2], size[0], table.dtype, table.device).T @ table


# The authors' tables of the first and of the second attention.
AUTHORS_TABLES = {
    "map_bias": ("an_bias", "na_bias"),
    "row_bias": ("ah_bias", "ha_bias"),
    "column_bias": ("aw_bias", "wa_bias"),
    "prefix_bias": ("ac_bias", "ca_bias"),
}


def pack_tables(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' bias tables of every agent attention, in pairs, as `Agent` holds them.

    an, na (heads, A, 7, 7) become map_bias; ah (1, heads, A, H, 1) and ha (1, heads, H, 1, A)
    row_bias; aw (1, heads, A, 1, W) and wa (1, heads, 1, W, A) column_bias; ac (1, heads, A, 1)
    and ca (1, heads, 1, A) prefix_bias. Other weights pass through.
    """
    pairs = {first: (ours, second) for ours, (first, second) in AUTHORS_TABLES.items()}
    seconds = {second for _, second in pairs.values()}
    packed = {}
    for name, value in state_dict.items():
        module, _, table = name.rpartition(".")
        if table in pairs:
            ours, second = pairs[table]
            other = state_dict[f"{module}.{second}"]
            if ours != "map_bias":
                heads, agents = value.shape[1:3]
                value = value.reshape(heads, agents, -1)
                other = other.reshape(heads, -1, agents).transpose(1, 2)
            packed[f"{module}.{ours}"] = torch.stack((value, other))
        elif table not in seconds:
            packed[name] = value
    return packed
