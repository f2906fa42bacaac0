"""The Triton kernels of `agent_attention`: their order, their tiles, their launches.

With a the agents, u the values that they aggregate, s the scores and p their softmax:

    forward     pool         a, adaptive averages of q
                aggregate    u and its softmax's maximum and sum     partial, per split of tokens
                merge        the partial results, rescaled to one maximum
                broadcast    out = softmax(q a^T + B2) u + conv(v)
    backward    agent gradient of broadcast     da, du                    partial, per split
                finish       du / sum, and its product with u, which aggregate's softmax subtracts
                token gradient of aggregate     dk, dv + conv^T(dout), dB1
                agent gradient of aggregate     da                        partial, per split
                finish       da, divided by the tokens of each agent's cell
                token gradient of broadcast     dq + what comes through the agents, dB2

A token gradient's program holds one block of tokens of one head and runs through images, so
that it sums the biases' gradients in registers. Up to 128 agents are one block, whose softmax
is recomputed whole; more are looped over, and *statistics* of the softmax over agents are made
once in backward. Nothing of size N A per image is stored; every sum has a fixed order.

For float16's sake, products with u's gradient are taken of du / sum and exp(s - maximum), each
of ordinary size, where du and the softmax alone grow and shrink with N.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from .agent_attention_backward_triton import (
    _aggregate_agent_gradient,
    _aggregate_token_gradient,
    _broadcast_agent_gradient,
    _broadcast_statistics,
    _broadcast_token_gradient,
    _finish,
)
from .agent_attention_forward_triton import _aggregate, _broadcast, _merge, _pool
from .triton_launch import Tile, launch, multiprocessors, split_tokens


@dataclass(frozen=True)
class Blocks:
    """How many agents a program holds, and the tiles of the kernels that split the tokens and
    of those that run through the images."""

    agents: int
    split: Tile
    chunk: Tile


@lru_cache
def _blocks(count: int, padded: int, itemsize: int) -> Blocks:
    if itemsize == 4:
        # float32 multiplies without tensor cores, and holds its operands in registers.
        tile = Tile(16 if padded > 64 else 32, 8, 1, 2, 64)
        return Blocks(min(64, max(16, triton.next_power_of_2(count))), tile, tile)
    agents = triton.next_power_of_2(max(count, 16))
    if agents > 128:
        agents = 64
    large = agents > 64 or padded > 64
    # Chosen by registers and spills in the machine code.
    if large:
        chunk = Tile(32, 8, 1, 1, 64)
    else:
        chunk = Tile(64, 8 if agents > 16 else 4, 1, 1 if agents > 16 else 2, 64)
    return Blocks(agents, Tile(64, 8 if large else 4, 2, 1 if large else 2, 64), chunk)


def _aligned(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The biases in `dtype`, contiguous, their rows padded with zeros to a multiple of 16."""
    tokens = bias.shape[-1]
    if tokens % 16 == 0:
        return bias.to(dtype).contiguous()
    padded = bias.new_zeros(*bias.shape[:-1], triton.cdiv(tokens, 16) * 16, dtype=dtype)
    padded[..., :tokens] = bias
    return padded


class Problem:
    """One call's sizes, and the launch of each kernel."""

    def __init__(
        self,
        projection: Tensor,
        bias: Tensor,
        heads: int,
        size: tuple[int, int],
        grid: tuple[int, int],
    ):
        self.projection = projection
        self.bias = _aligned(bias, projection.dtype)
        self.bias_row = self.bias.shape[-1]
        self.heads = heads
        self.size = size
        self.grid = grid
        self.batch, self.tokens, packed = projection.shape
        self.width = packed // (3 * heads)
        self.padded = max(16, triton.next_power_of_2(self.width))
        self.rows = self.batch * heads
        self.count = grid[0] * grid[1]
        self.prefix = self.tokens - size[0] * size[1]
        self.scale = self.width**-0.5
        self.blocks = self.plan()
        self.agent_blocks = triton.cdiv(self.count, self.blocks.agents)
        self.strides = projection.stride()[:2]

    def plan(self) -> Blocks:
        return _blocks(self.count, self.padded, self.projection.element_size())

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.projection.device)

    def split(self, rows: int) -> tuple[int, int]:
        """Programs for each of `rows`, and tokens a program."""
        device = self.projection.device
        return split_tokens(self.blocks.split, rows, self.tokens, multiprocessors(device))

    def reach(self) -> list[int]:
        """Of how many rows and columns of agents one token can be in the cells."""
        return [
            max(1, cells // length)
            if length % cells == 0 or cells % length == 0
            # Cells that overlap, and the first of them at any place within a cell.
            else (cells - 1) // length + 2
            for length, cells in zip(self.size, self.grid, strict=True)
        ]

    def options(self, tile: Tile) -> dict:
        return {
            "COUNT": self.count,
            "AGENTS": self.blocks.agents,
            "D": self.width,
            "P": self.padded,
            "BLOCK": tile.block,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def small(self) -> tuple[int, dict]:
        """Programs a head, and options, of the kernels that sum over splits."""
        rows = 4
        return triton.cdiv(self.count, rows), {
            "COUNT": self.count,
            "D": self.width,
            "P": self.padded,
            "ROWS": rows,
            "CHUNK": max(2, 2048 // (rows * self.padded)),
            "num_warps": 4,
        }

    def pool(self, agents: Tensor) -> None:
        channels = self.heads * self.width
        block = min(512, triton.next_power_of_2(channels))
        launch(
            _pool, (self.batch * self.count, triton.cdiv(channels, block)),
            self.projection, agents, *self.strides, *self.size, self.prefix, self.heads,
            D=self.width, ROWS=self.grid[0], COLUMNS=self.grid[1], CHANNELS=block,
            BLOCK=max(2, 2048 // block), num_warps=4,
        )  # fmt: skip

    def aggregate(self, agents: Tensor, values: Tensor, statistics: Tensor) -> None:
        splits, per_split = self.split(self.rows * self.agent_blocks)
        parts = (values, statistics)
        if splits > 1:
            parts = (
                self.empty(self.rows, splits, self.count, self.width),
                self.empty(self.rows, splits, 2, self.count),
            )
        launch(
            _aggregate, (self.rows, splits, self.agent_blocks),
            self.projection, agents, self.bias, *parts, *self.strides, self.bias_row,
            self.tokens, per_split, self.heads, self.scale, **self.options(self.blocks.split),
        )  # fmt: skip
        if splits > 1:
            programs, options = self.small()
            launch(_merge, (self.rows, programs), *parts, values, statistics, splits, **options)

    def broadcast(
        self,
        agents: Tensor,
        values: Tensor,
        weight: Tensor,
        weight_bias: Tensor | None,
        out: Tensor,
    ) -> None:
        splits, per_split = self.split(self.rows)
        launch(
            _broadcast, (self.rows, splits),
            self.projection, agents, values, self.bias, weight,
            weight if weight_bias is None else weight_bias, out, *self.strides, self.bias_row,
            self.tokens, per_split, self.heads, *self.size, self.prefix, self.scale,
            K=weight.shape[-1], WEIGHT_BIAS=weight_bias is not None,
            **self.options(self.blocks.split),
        )  # fmt: skip

    def broadcast_statistics(self, grad: Tensor, agents: Tensor, values: Tensor) -> Tensor:
        """Of the softmax over more agents than one block; else empty, and not read."""
        if self.agent_blocks == 1:
            return values
        statistics = self.empty(self.rows, 2, self.tokens)
        splits, per_split = self.split(self.rows)
        launch(
            _broadcast_statistics, (self.rows, splits),
            self.projection, grad, agents, values, self.bias, statistics,
            *self.strides, *grad.stride()[:2], self.bias_row, self.tokens, per_split, self.heads,
            self.scale, **self.options(self.blocks.split),
        )  # fmt: skip
        return statistics

    def finish(
        self, parts: Tensor, values: Tensor, statistics: Tensor, agent: bool
    ) -> tuple[Tensor, Tensor]:
        gradient = self.empty(self.rows, self.count, self.width, dtype=self.projection.dtype)
        inner = gradient if agent else self.empty(self.rows, self.count)
        programs, options = self.small()
        launch(
            _finish, (self.rows, programs),
            parts, values, statistics, gradient, inner, parts.shape[1], *self.size,
            COLUMNS=self.grid[1], AGENT=agent, **options,
        )  # fmt: skip
        return gradient, inner

    def agent_gradients(
        self, grad: Tensor, agents: Tensor, values: Tensor, statistics: Tensor, softmax: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """da, ready for the tokens of each cell; du / sum, and its products with u."""
        splits, per_split = self.split(self.rows * self.agent_blocks)
        shape = (self.rows, splits, self.count, self.width)
        agent_parts = self.empty(self.rows, 2 * splits, *shape[2:])
        value_parts = self.empty(*shape)
        grid = (self.rows, splits, self.agent_blocks)
        options = self.options(self.blocks.split)
        sizes = (
            self.bias_row, self.tokens, per_split, self.heads, self.scale, agent_parts.stride(0),
        )  # fmt: skip
        launch(
            _broadcast_agent_gradient, grid,
            self.projection, grad, agents, values, self.bias, softmax, agent_parts, value_parts,
            *self.strides, *grad.stride()[:2], *sizes, **options,
        )  # fmt: skip
        slopes, inner = self.finish(value_parts, values, statistics, agent=False)
        launch(
            _aggregate_agent_gradient, grid,
            self.projection, agents, slopes, self.bias, statistics, inner, agent_parts[:, splits:],
            *self.strides, *sizes, **options,
        )  # fmt: skip
        return self.finish(agent_parts, values, statistics, agent=True)[0], slopes, inner

    def token_gradients(self, launches: tuple) -> Tensor:
        """Run each `launch(grid, parts, per_chunk, options)` for every token and every bias; return
        the biases' gradient."""
        tile = self.blocks.chunk
        grid = (self.heads, triton.cdiv(self.tokens, tile.block))
        wanted = tile.resident * multiprocessors(self.projection.device)
        chunks = max(1, min(self.batch, wanted // (grid[0] * grid[1] * self.agent_blocks)))
        per_chunk = triton.cdiv(self.batch, chunks)
        chunks = triton.cdiv(self.batch, per_chunk)
        parts = self.empty(2, chunks, self.heads, self.count, self.tokens)
        whole = self.agent_blocks == 1
        options = self.options(tile)
        for run, part in zip(launches, parts, strict=True):
            run(
                (*grid, chunks * self.agent_blocks), part, per_chunk,
                {"BIAS": True, "WRITE": whole, **options},
            )  # fmt: skip
            if not whole:
                run((*grid, self.batch), part, 1, {"BIAS": False, "WRITE": True, **options})
        return parts.sum(1)


def forward(
    problem: Problem,
    weight: Tensor,
    weight_bias: Tensor | None,
    out: Tensor,
    agents: Tensor,
    values: Tensor,
    statistics: Tensor,
) -> None:
    """Write the result to `out`, and what `backward` needs to the others."""
    problem.pool(agents)
    problem.aggregate(agents, values, statistics)
    problem.broadcast(agents, values, weight, weight_bias, out)


def backward(
    problem: Problem,
    grad: Tensor,
    weight: Tensor,
    agents: Tensor,
    values: Tensor,
    statistics: Tensor,
    total: Tensor,
) -> Tensor:
    """Write the projection's gradient to `total`; return that of the bias, in float32."""
    softmax = problem.broadcast_statistics(grad, agents, values)
    dagents, slopes, inner = problem.agent_gradients(grad, agents, values, statistics, softmax)
    strides = (*problem.strides, *grad.stride()[:2], *total.stride()[:2])

    def sizes(per_chunk: int) -> tuple:
        return (
            problem.bias_row, problem.tokens, problem.heads, *problem.size, problem.prefix,
            problem.batch, per_chunk, problem.scale,
        )  # fmt: skip

    def aggregate(grid: tuple, parts: Tensor, per_chunk: int, options: dict) -> None:
        launch(
            _aggregate_token_gradient, grid,
            problem.projection, grad, agents, slopes, problem.bias, statistics, inner, weight,
            total, parts, *strides, *sizes(per_chunk), K=weight.shape[-1], **options,
        )  # fmt: skip

    def broadcast(grid: tuple, parts: Tensor, per_chunk: int, options: dict) -> None:
        launch(
            _broadcast_token_gradient, grid,
            problem.projection, grad, agents, values, dagents, problem.bias, softmax,
            total, parts, *strides, *sizes(per_chunk), *problem.reach(),
            ROWS=problem.grid[0], COLUMNS=problem.grid[1], **options,
        )  # fmt: skip

    return problem.token_gradients((aggregate, broadcast))
