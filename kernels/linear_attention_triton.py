"""The Triton kernels of `linear_attention`: their order, their tiles, their launches.

With p_j the key weights (a softmax over tokens, or 1 / N), f = phi, R the rotation and bars
means over tokens, a pass over the tokens is one kernel, split over tokens so that one image
fills the device:

    forward     query sums      sum f(q)                                    (key weights only)
                state           S = sum p R(f(k))^T v, mean p f(k), mean v  partial, per split
                merge           the partial sums in a fixed order, rescaled to one maximum
                readout         y = a(n) R(f(q)) S + b(n) mean v, epilogue
    backward    output gradient dS, d mean k, d mean v; dgate, dlocal
                merge
                key gradient    dk, dv and, per split, d mean q
                query gradient  dq, which with key weights needs d mean q

Nothing of size N is stored besides inputs and outputs: softmax and feature maps are
recomputed. Every sum has a fixed order, so two runs agree bit for bit.

With P the head width padded to a power of two, features are K = P wide, or 2 P if norm-aware:
each channel's positive and negative part. They exist in registers alone, interleaved: both
turn by the angle of their channel, and neither costs a byte.

The *state* that forward leaves for backward is float32, for each head S (K, P), then mean k (K),
mean v (P), D^-0.5 mean q (K), and the softmax's maximum and sum (P).
"""

import torch
from torch import Tensor

from .linear_attention import feature_width, padded_width, state_shape
from .linear_attention_backward_triton import (
    _key_gradient,
    _output_gradient,
    _query_gradient,
)
from .linear_attention_forward_triton import _merge, _query_sums, _read, _state
from .triton_launch import MOST_SPLITS, Tile, launch, multiprocessors, split_tokens

REGISTERS = 65536  # of a multiprocessor
MERGE_ELEMENTS = 2048
# Splits at most, and how many of them at a time.
MERGE_CHUNKS = ((4, 1), (8, 2), (16, 16), (MOST_SPLITS, 64))


# By kernel, for 16-bit inputs and padded head widths up to 64 and up to 128; chosen by
# registers, spills and instructions in the machine code, see docs/performance.md.
TILES = {
    "query_sums": {64: Tile(64, 4, 1, 8, 256), 128: Tile(64, 8, 1, 4, 256)},
    "state": {64: Tile(64, 4, 2, 3, 256), 128: Tile(64, 8, 1, 1, 512)},
    "read": {64: Tile(64, 4, 3, 3, 128), 128: Tile(64, 8, 1, 1, 256)},
    "output_gradient": {64: Tile(64, 4, 2, 2, 256), 128: Tile(64, 8, 1, 1, 512)},
    "key_gradient": {64: Tile(64, 4, 3, 2, 256), 128: Tile(64, 8, 1, 1, 256)},
    "query_gradient": {64: Tile(64, 4, 2, 3, 128), 128: Tile(64, 8, 1, 1, 256)},
}
# Of features twice as wide as their head, up to a head width of 64.
DOUBLED_TILE = Tile(64, 4, 1, 2, 256)
# float32 multiplies without tensor cores, and holds its operands in registers.
WIDE_TILES = {64: Tile(16, 8, 1, 2, 128), 128: Tile(16, 16, 1, 1, 128)}


class Problem:
    """One call's sizes and flags, and the launch of each kernel."""

    def __init__(
        self,
        query: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        feature_map: str,
        key_weights: str,
        readout: str,
    ):
        self.batch, self.tokens, self.heads, self.width = query.shape
        self.padded = padded_width(self.width)
        self.features = feature_width(self.padded, feature_map)
        # Rows of a state that are sums over tokens: of S, of mean k and of mean v.
        self.merged_rows = self.features + self.features // self.padded + 1
        self.rows = self.batch * self.heads
        self.device = query.device
        self.itemsize = query.element_size()
        self.scale = self.width**-0.5
        self.weighted = key_weights == "global_query"
        self.readout = readout
        self.mean_value = readout != "normalized"
        self.map = feature_map
        self.rotary = rotary is not None
        if rotary is None:
            self.tables = (query, query, 1, 1 << 31, 31, 0, 0)
        else:
            rows, columns = (table.float().contiguous() for table in rotary)
            width = columns.shape[1]
            # n // width = n * reciprocal >> shift, exactly, for every n < 2^31.
            shift = 31 + (width - 1).bit_length()
            reciprocal = -(-(1 << shift) // width)
            self.tables = (
                rows, columns, width, reciprocal, shift, rows.stride(0), columns.stride(0),
            )  # fmt: skip

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def tile(self, kernel: str) -> Tile:
        width = 64 if self.features <= 64 else 128
        if self.itemsize == 4:
            return WIDE_TILES[width]
        return DOUBLED_TILE if width > self.padded else TILES[kernel][width]

    def split(self, tile: Tile) -> tuple[int, int]:
        return split_tokens(tile, self.rows, self.tokens, multiprocessors(self.device))

    def options(self, tile: Tile) -> dict:
        return {
            "D": self.width,
            "P": self.padded,
            "K": self.features,
            "BLOCK": tile.block,
            "MAP": self.map,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": min(255, REGISTERS // (tile.resident * tile.warps * 32) // 8 * 8),
        }

    def fold(self, tile: Tile) -> int:
        """The rows that a program's warps load at once, 16 bytes a thread."""
        return min(tile.block, tile.warps * 512 // (self.padded * self.itemsize))

    def query_sums(self, query: Tensor) -> Tensor:
        tile = self.tile("query_sums")
        splits, per_split = self.split(tile)
        parts = self.empty(self.rows, splits, self.features)
        launch(
            _query_sums, (self.rows, splits),
            query, parts, *query.stride()[:3], self.tokens, per_split, self.heads,
            FOLD=self.fold(tile), **self.options(tile),
        )  # fmt: skip
        return parts

    def state(self, key: Tensor, value: Tensor, query_parts: Tensor | None) -> Tensor:
        tile = self.tile("state")
        splits, per_split = self.split(tile)
        parts = self.empty(self.rows, splits, self.merged_rows + 1, self.padded)
        rows, columns, *table = self.tables
        launch(
            _state, (self.rows, splits),
            key, value, rows, columns, parts if query_parts is None else query_parts, parts,
            *key.stride()[:3], *value.stride()[:3],
            self.tokens, per_split, self.heads, *table,
            0 if query_parts is None else query_parts.shape[1], self.scale,
            FOLD=self.fold(tile),
            WEIGHTED=self.weighted, ROTARY=self.rotary, MEAN_VALUE=self.mean_value,
            **self.options(tile),
        )  # fmt: skip
        return self.merge(parts, query_parts)

    def merge_tile(self, splits: int) -> tuple[int, int]:
        """The state's rows a program of `_merge`, and the splits that it sums at a time: of many
        heads, which have few splits, large pieces; of few, small ones, that the device be busy."""
        chunk = next(size for most, size in MERGE_CHUNKS if splits <= most)
        return max(1, MERGE_ELEMENTS // (chunk * self.padded)), chunk

    def pieces(self) -> int:
        """How many programs a head merge the state's gradient, of which each leaves a piece."""
        splits, _ = self.split(self.tile("output_gradient"))
        return -(-self.merged_rows // self.merge_tile(splits)[0])

    def merge(
        self, parts: Tensor, query_parts: Tensor | None = None, state: Tensor | None = None
    ) -> Tensor:
        rows, chunk = self.merge_tile(parts.shape[1])
        total = self.empty(*state_shape(self.rows, self.width, self.map))
        backward = state is not None
        launch(
            _merge, (self.rows, -(-self.merged_rows // rows)),
            parts, parts if query_parts is None else query_parts, total,
            total if state is None else state, self.tokens, parts.shape[1],
            0 if query_parts is None else query_parts.shape[1], self.scale,
            P=self.padded, K=self.features, ROWS=rows, CHUNK=chunk,
            WEIGHTED=self.weighted and not backward, MEAN_VALUE=self.mean_value,
            BACKWARD=backward, num_warps=4,
        )  # fmt: skip
        return total

    def read(
        self, query: Tensor, state: Tensor, local: Tensor | None, gate: Tensor | None, out: Tensor
    ) -> None:
        tile = self.tile("read")
        splits, per_split = self.split(tile)
        rows, columns, *table = self.tables
        launch(
            _read, (self.rows, splits),
            query, rows, columns, _or(local, query), _or(gate, query), state, out,
            *_strides(query), *_strides(local), *_strides(gate), *_strides(out),
            self.tokens, per_split, self.heads, *table, self.scale,
            READOUT=self.readout, ROTARY=self.rotary,
            LOCAL=local is not None, GATE=gate is not None, **self.options(tile),
        )  # fmt: skip

    def output_gradient(
        self,
        query: Tensor,
        grad: Tensor,
        state: Tensor,
        local: Tensor | None,
        gate: Tensor | None,
        dlocal: Tensor | None,
        dgate: Tensor | None,
    ) -> Tensor:
        tile = self.tile("output_gradient")
        splits, per_split = self.split(tile)
        parts = self.empty(self.rows, splits, self.merged_rows + 1, self.padded)
        rows, columns, *table = self.tables
        launch(
            _output_gradient, (self.rows, splits),
            query, grad, rows, columns, _or(local, query), _or(gate, query), state, parts,
            _or(dlocal, query), _or(dgate, query),
            *_strides(query), *_strides(grad), *_strides(local), *_strides(gate),
            *_strides(dlocal), *_strides(dgate),
            self.tokens, per_split, self.heads, *table, self.scale,
            READOUT=self.readout, ROTARY=self.rotary,
            LOCAL=local is not None, GATE=gate is not None, **self.options(tile),
        )  # fmt: skip
        return self.merge(parts, state=state)

    def key_gradient(
        self,
        key: Tensor,
        value: Tensor,
        state: Tensor,
        dstate: Tensor,
        dkey: Tensor,
        dvalue: Tensor,
        add: bool,
    ) -> Tensor:
        tile = self.tile("key_gradient")
        splits, per_split = self.split(tile)
        query_parts = self.empty(self.rows, splits, self.features)
        excess = self.empty(self.rows, splits)
        rows, columns, *table = self.tables
        correct = self.weighted and key.dtype != torch.bfloat16
        for measure in (True, False) if correct else (False,):
            launch(
                _key_gradient, (self.rows, splits),
                key, value, rows, columns, state, dstate, query_parts, excess, dkey, dvalue,
                *_strides(key), *_strides(value), *_strides(dkey), *_strides(dvalue),
                self.tokens, per_split, self.heads, *table, splits, self.pieces(), self.scale,
                WEIGHTED=self.weighted, ROTARY=self.rotary, MEAN_VALUE=self.mean_value,
                ADD=add,
                MEASURE=measure, CORRECT=correct and not measure, **self.options(tile),
            )  # fmt: skip
        return query_parts

    def query_gradient(
        self,
        query: Tensor,
        grad: Tensor,
        state: Tensor,
        query_parts: Tensor,
        gate: Tensor | None,
        dquery: Tensor,
    ) -> None:
        tile = self.tile("query_gradient")
        splits, per_split = self.split(tile)
        rows, columns, *table = self.tables
        launch(
            _query_gradient, (self.rows, splits),
            query, grad, rows, columns, _or(gate, query), state, query_parts, dquery,
            *_strides(query), *_strides(grad), *_strides(gate), *_strides(dquery),
            self.tokens, per_split, self.heads, *table, query_parts.shape[1], self.scale,
            WEIGHTED=self.weighted, READOUT=self.readout, ROTARY=self.rotary,
            GATE=gate is not None, **self.options(tile),
        )  # fmt: skip


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def forward(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    local: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Write the result to `out`; return the state that `backward` needs."""
    query_parts = problem.query_sums(query) if problem.weighted else None
    state = problem.state(key, value, query_parts)
    problem.read(query, state, local, gate, out)
    return state


def backward(
    problem: Problem,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    local: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dlocal: Tensor | None,
    dgate: Tensor | None,
    between=None,
) -> None:
    """Write every gradient. `between` runs once `dlocal` is complete, and may leave in `dvalue`
    what comes through the local branch: the gradient here is then added to it."""
    dstate = problem.output_gradient(query, grad, state, local, gate, dlocal, dgate)
    if between is not None:
        between()
    query_parts = problem.key_gradient(
        key, value, state, dstate, dkey, dvalue, add=between is not None
    )
    if dlocal is not None:
        # The product grad * gate is there already: one tensor to read, not two.
        grad, gate = dlocal, None
    problem.query_gradient(query, grad, state, query_parts, gate, dquery)
