"""The launch decisions of `agent_attention`, and the order of its kernels.

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

import torch
import triton

from ..runtime.launch import (
    Launch,
    Tile,
    cache_plan,
    cdiv,
    count_multiprocessors,
    pad_size,
    split_tokens,
)


@dataclass(frozen=True)
class Blocks:
    """How the agents and tokens are cut.

    Args:
        agents: agents that a program holds.
        split: the tile of the kernels that split the tokens.
        chunk: the tile of the kernels that run through the images.
    """

    agents: int
    split: Tile
    chunk: Tile


def choose_blocks(count: int, padded: int, itemsize: int) -> Blocks:
    """The blocks for `count` agents, by padded head width and bytes of an input."""
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


# Rows per program, and elements per step, of the kernels that sum over splits.
SUM_ROWS, SUM_ELEMENTS = 4, 2048


@dataclass(frozen=True)
class Plan:
    """Sizes and launches for one signature.

    Args:
        rows: sequences of tokens, B * heads.
        count: agents.
        width: channels per head.
        tokens: tokens per image, N.
        splits: into how many parts `aggregate` and both agent gradients cut the tokens.
        has_statistics: whether the agents are several blocks, so that `broadcast_statistics`
            makes the statistics of the softmax over them.
        bias_parts: the shape of the parts of both biases' gradients.
        pool, ..., broadcast_token_gradient: the launches. If the agents are several blocks, each
            token gradient has two: the first for the bias, the second for the tokens.
    """

    rows: int
    count: int
    width: int
    tokens: int
    splits: int
    has_statistics: bool
    bias_parts: tuple[int, ...]
    pool: Launch
    aggregate: Launch
    merge: Launch
    broadcast: Launch
    broadcast_statistics: Launch
    broadcast_agent_gradient: Launch
    finish_values: Launch
    aggregate_agent_gradient: Launch
    finish_agents: Launch
    aggregate_token_gradient: tuple[Launch, ...]
    broadcast_token_gradient: tuple[Launch, ...]


@cache_plan
def plan(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    size: tuple[int, int],
    grid: tuple[int, int],
    kernel: int,
    weight_bias: bool,
) -> Plan:
    """Plan for projections of one shape (B, N, 3 C).

    Args:
        shape, dtype, device: of the projection.
        heads, size, grid: as in `agent_attention`.
        kernel: the side of the local branch's window.
        weight_bias: whether the local branch has a bias.
    """
    if 0 in size or 0 in grid:
        raise ValueError(f"size is {size} and grid is {grid}, expected sides of at least 1")
    batch, tokens, packed = shape
    width = packed // (3 * heads)
    padded = pad_size(width)
    rows, count = batch * heads, grid[0] * grid[1]
    prefix, scale = tokens - size[0] * size[1], width**-0.5
    blocks = choose_blocks(count, padded, dtype.itemsize)
    agent_blocks = cdiv(count, blocks.agents)
    bias_row = pad_row(tokens)

    def options(tile: Tile) -> dict:
        return {
            "COUNT": count, "AGENTS": blocks.agents, "D": width, "P": padded,
            "BLOCK": tile.block, "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    split = options(blocks.split)
    # Kernels that cut tokens and agents, and kernels that cut the tokens alone.
    splits, per_split = split_tokens(blocks.split, rows * agent_blocks, tokens, device)
    agent_grid, agent_sizes = (rows, splits, agent_blocks), (bias_row, tokens, per_split, heads)
    token_splits, per_split = split_tokens(blocks.split, rows, tokens, device)
    token_grid, token_sizes = (rows, token_splits), (bias_row, tokens, per_split, heads)

    small = {
        "COUNT": count, "D": width, "P": padded, "ROWS": SUM_ROWS,
        "CHUNK": max(2, SUM_ELEMENTS // (SUM_ROWS * padded)), "num_warps": 4,
    }  # fmt: skip
    small_grid = (rows, cdiv(count, SUM_ROWS))

    def make_finish(parts: int, agent: bool) -> Launch:
        constants = {"COLUMNS": grid[1], "AGENT": agent, **small}
        return Launch(small_grid, (parts, *size), constants)

    channels = min(512, triton.next_power_of_2(heads * width))
    pool = {
        "D": width, "ROWS": grid[0], "COLUMNS": grid[1], "CHANNELS": channels,
        "BLOCK": max(2, 2048 // channels), "num_warps": 4,
    }  # fmt: skip
    # The distance between two heads in the parts that both agent gradients write.
    part_stride = 2 * splits * count * width

    tile = blocks.chunk
    chunk_grid = (heads, cdiv(tokens, tile.block))
    wanted = tile.resident * count_multiprocessors(device)
    chunks = max(1, min(batch, wanted // (chunk_grid[0] * chunk_grid[1] * agent_blocks)))
    per_chunk = max(1, cdiv(batch, chunks))
    chunks = cdiv(batch, per_chunk)
    is_whole = agent_blocks == 1

    def make_token_gradients(*sizes: int, **constants: int) -> tuple[Launch, ...]:
        def make(programs: int, images: int, bias: bool, write: bool) -> Launch:
            shared = (bias_row, tokens, heads, *size, prefix, batch, images, scale)
            flags = {"BIAS": bias, "WRITE": write, **constants, **options(tile)}
            return Launch((*chunk_grid, programs), (*shared, *sizes), flags)

        if is_whole:
            return (make(chunks, per_chunk, bias=True, write=True),)
        bias = make(chunks * agent_blocks, per_chunk, bias=True, write=False)
        return bias, make(batch, 1, bias=False, write=True)

    return Plan(
        rows, count, width, tokens, splits,
        has_statistics=not is_whole,
        bias_parts=(2, chunks, heads, count, tokens),
        pool=Launch(
            (batch * count, cdiv(heads * width, channels)), (*size, prefix, heads), pool
        ),
        aggregate=Launch(agent_grid, (*agent_sizes, scale), split),
        merge=Launch(small_grid, (splits,), small),
        broadcast=Launch(
            token_grid, (*token_sizes, *size, prefix, scale),
            {"K": kernel, "WEIGHT_BIAS": weight_bias, **split},
        ),
        broadcast_statistics=Launch(token_grid, (*token_sizes, scale), split),
        broadcast_agent_gradient=Launch(agent_grid, (*agent_sizes, scale, part_stride), split),
        finish_values=make_finish(splits, agent=False),
        aggregate_agent_gradient=Launch(agent_grid, (*agent_sizes, scale, part_stride), split),
        finish_agents=make_finish(2 * splits, agent=True),
        aggregate_token_gradient=make_token_gradients(K=kernel),
        broadcast_token_gradient=make_token_gradients(
            *_reach(size, grid), ROWS=grid[0], COLUMNS=grid[1]
        ),
    )  # fmt: skip


def pad_row(tokens: int) -> int:
    """The length of a bias's row: a multiple of 16, so that eight entries are one load."""
    return cdiv(tokens, 16) * 16


def _reach(size: tuple[int, int], grid: tuple[int, int]) -> list[int]:
    """The numbers of rows and columns of agents whose cells one token can be in."""
    return [
        max(1, cells // length)
        if length % cells == 0 or cells % length == 0
        # The cells overlap, and a token is at any place within the first of them.
        else (cells - 1) // length + 2
        for length, cells in zip(size, grid, strict=True)
    ]
