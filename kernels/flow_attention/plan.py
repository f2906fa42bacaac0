"""The launch decisions of `flow_attention`, and the order of its kernels.

With q and k behind their sigmoids, S = sum_j w_j k_j^T v_j and w_j = N softmax_j(c_j), a pass over
the tokens is one kernel, split over tokens so that one image fills the device:

    forward     token sums        sum q, sum k                     partial, per split
                flow sums         sum O k, sum I q                 partial
                state             S times its softmax's sum, and that sum    partial
                merge             S and the softmax's sum
                readout           y
    backward    output gradient   dS, d sum O k                    partial
                merge
                value gradient    dv;  d sum I q, d sum q          partial
                query gradient    dq;  d sum k                     partial
                key gradient      dk

8 passes over a tensor forward, and 11 backward. Partial sums of vectors are summed, in a fixed
order, by each program of the next pass; the states are merged by a kernel of their own. As
|c| <= 1, the softmax needs no maximum. Nothing of size N is stored besides inputs and outputs.

A program takes P neighbouring channels of every token: one head, or as many as are 32 channels. Of
one head of 8 channels it would read half of each sector of 32 bytes, and pad it to the 16 of the
tensor cores' tiles: as many operations as S, block-diagonal, of four heads at once.

The *state* that forward leaves for backward is float32, for each group of heads: W rows of P of S,
of which the row e has S[d, e] at channel d of each head; the softmax's sum of each channel's head;
and sum q, sum k, sum O k and sum I q.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.launch import MOST_SPLITS, Launch, Tile, cache_plan, split_tokens
from .operator import padded_width, state_shape

# Registers of a multiprocessor.
REGISTERS = 65536
# By kernel, for 16-bit inputs and programs of 32, 64 and 128 channels; chosen by registers, spills
# and instructions in the machine code, see docs/performance.md.
_GRADIENT = {32: Tile(64, 4, 1, 3, 128), 64: Tile(64, 4, 1, 2, 256), 128: Tile(32, 8, 1, 1, 256)}
TILES = {
    "token_sums": {
        32: Tile(128, 4, 1, 8, 128),
        64: Tile(64, 4, 1, 8, 256),
        128: Tile(32, 4, 1, 8, 256),
    },
    "flow_sums": {
        32: Tile(128, 4, 1, 5, 128),
        64: Tile(64, 4, 1, 5, 256),
        128: Tile(32, 4, 1, 5, 256),
    },
    "state": {32: Tile(64, 4, 1, 4, 128), 64: Tile(64, 4, 1, 3, 256), 128: Tile(64, 8, 1, 1, 512)},
    "read": {32: Tile(64, 4, 1, 4, 128), 64: Tile(64, 4, 1, 3, 128), 128: Tile(64, 8, 1, 1, 256)},
    "output_gradient": _GRADIENT,
    "value_gradient": _GRADIENT,
    "query_gradient": _GRADIENT,
    "key_gradient": _GRADIENT,
}
# float32 multiplies without tensor cores, and holds its operands in registers.
WIDE_TILES = {32: Tile(32, 8, 1, 2, 128), 64: Tile(16, 8, 1, 2, 128), 128: Tile(16, 16, 1, 1, 128)}
# The splits and columns that a program merges at a time, by the largest number of splits.
MERGE_TILES = ((8, 4, 256), (MOST_SPLITS, 32, 64))


def choose_tile(kernel: str, channels: int, itemsize: int) -> Tile:
    """The tile of a kernel by the channels of a program, and the bytes of an input."""
    return WIDE_TILES[channels] if itemsize == 4 else TILES[kernel][channels]


@dataclass(frozen=True)
class Plan:
    """Sizes and launches for one signature.

    Args:
        rows: groups of heads of all images.
        padded: padded width of a head, W.
        channels: channels of a program, P.
        token_sums, ..., key_gradient: the launches.
    """

    rows: int
    padded: int
    channels: int
    token_sums: Launch
    flow_sums: Launch
    state: Launch
    merge: Launch
    read: Launch
    output_gradient: Launch
    merge_gradient: Launch
    value_gradient: Launch
    query_gradient: Launch
    key_gradient: Launch

    def empty(self, x: Tensor, *shape: int) -> Tensor:
        """A new float32 tensor (rows, ..., P) on the device of `x`."""
        return torch.empty((self.rows, *shape, self.channels), dtype=torch.float32, device=x.device)


@cache_plan
def plan(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Plan:
    """Plan for queries of one shape (B, N, heads, D)."""
    batch, tokens, heads, width = shape
    padded = padded_width(width)
    rows, state_rows, channels = state_shape(batch, heads, width)

    def make(kernel: str, *splits: int, fold: bool = False) -> Launch:
        tile = choose_tile(kernel, channels, dtype.itemsize)
        count, per_split = split_tokens(tile, rows, tokens, device)
        constants = {
            "D": width, "W": padded, "P": channels, "BLOCK": tile.block,
            "num_warps": tile.warps, "num_stages": tile.stages,
            "maxnreg": min(255, REGISTERS // (tile.resident * tile.warps * 32) // 8 * 8),
        }  # fmt: skip
        if fold:
            # The rows that a program's warps load at once, 16 bytes per thread.
            constants["FOLD"] = min(tile.block, tile.warps * 512 // (channels * dtype.itemsize))
        return Launch((rows, count), (tokens, per_split, heads, *splits), constants)

    def make_merge(splits: int, total_rows: int) -> Launch:
        _, chunk, columns = next(tile for tile in MERGE_TILES if splits <= tile[0])
        size = (padded + 1) * channels
        constants = {
            "SIZE": size, "STRIDE": total_rows * channels, "ROWS": chunk, "COLUMNS": columns,
            "num_warps": 4,
        }  # fmt: skip
        return Launch((rows, -(-size // columns)), (splits,), constants)

    token_sums = make("token_sums", fold=True)
    flow_sums = make("flow_sums", token_sums.grid[1], fold=True)
    state = make("state", flow_sums.grid[1])
    output_gradient = make("output_gradient")
    value_gradient = make("value_gradient", fold=True)
    query_gradient = make("query_gradient", value_gradient.grid[1])
    return Plan(
        rows, padded, channels,
        token_sums=token_sums,
        flow_sums=flow_sums,
        state=state,
        merge=make_merge(state.grid[1], state_rows),
        read=make("read", flow_sums.grid[1]),
        output_gradient=output_gradient,
        merge_gradient=make_merge(output_gradient.grid[1], padded + 1),
        value_gradient=value_gradient,
        query_gradient=query_gradient,
        key_gradient=make("key_gradient", query_gradient.grid[1]),
    )  # fmt: skip
