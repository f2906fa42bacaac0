"""The launch decisions of `linear_attention`, and the order of its kernels.

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

With P the head width padded to a power of two, features are K = P wide, or 2 P of a map that
splits channels by their signs (`norm_aware`, `signed_power`): each channel's positive and negative
part. They exist in registers alone, interleaved: both turn by the angle of their channel, and
neither costs a byte.

The map `signed_power` and the readout `polarized` are those of `polarity_attention`. The map has
parameters, which stand where the tables of a rotation would. Backward leaves their gradients in
parts, per split, as it does d mean q. The readout gives the second half of the channels the state,
and the mean, whose positive and negative parts have changed places, and a normaliser of their own.

The *state* that forward leaves for backward is float32, for each head S (K, P), then mean k (K),
mean v (P), D^-0.5 mean q (K), and the softmax's maximum and sum (P).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.launch import MOST_SPLITS, Launch, Tile, cache_plan, split_tokens
from .operator import feature_width, padded_width, state_shape

# Programs that share a short sequence: of one image of 224 px more would stand still. A merge of so
# many takes as long as one of few; of more it costs large maps what it gains.
FEW_SPLITS = 64
# Registers of a multiprocessor.
REGISTERS = 65536
MERGE_ELEMENTS = 2048
# By the largest number of splits: how many of them are summed at a time. Each is a kernel more to
# compile, and the splits depend on the size of the map.
MERGE_CHUNKS = ((8, 4), (MOST_SPLITS, 32))
# By kernel, for 16-bit inputs and features up to 32, up to 64 and up to 128 wide; chosen by
# registers, spills and instructions in the machine code, see docs/performance.md.
TILES = {
    "query_sums": (Tile(64, 4, 1, 8, 256), Tile(64, 4, 1, 8, 256), Tile(64, 8, 1, 4, 256)),
    "state": (Tile(64, 4, 2, 3, 256), Tile(64, 4, 2, 3, 256), Tile(64, 8, 1, 1, 512)),
    "read": (Tile(64, 4, 3, 4, 128), Tile(64, 4, 3, 3, 128), Tile(64, 8, 1, 1, 256)),
    "output_gradient": (Tile(64, 4, 2, 2, 256), Tile(64, 4, 2, 2, 256), Tile(64, 8, 1, 1, 512)),
    "key_gradient": (Tile(64, 4, 3, 4, 256), Tile(64, 4, 3, 2, 256), Tile(64, 8, 1, 1, 256)),
    "query_gradient": (Tile(64, 4, 2, 4, 128), Tile(64, 4, 2, 3, 128), Tile(64, 8, 1, 1, 256)),
}
# For features twice as wide as their head, up to a head width of 64, of which one map has its own.
DOUBLED_TILE = Tile(64, 4, 1, 2, 256)
SIGNED_POWER_TILES = {
    ("read", 64): Tile(64, 4, 1, 4, 128),
    ("query_gradient", 128): Tile(64, 8, 1, 1, 256),
}
# float32 multiplies without tensor cores, and holds its operands in registers.
WIDE_TILES = {64: Tile(16, 8, 1, 2, 128), 128: Tile(16, 16, 1, 1, 128)}


def choose_tile(kernel: str, feature_map: str, features: int, padded: int, itemsize: int) -> Tile:
    """The tile of a kernel by the map, the widths of features and head, and an input's bytes."""
    width = 64 if features <= 64 else 128
    if itemsize == 4:
        return WIDE_TILES[width]
    if feature_map == "signed_power":
        return SIGNED_POWER_TILES.get((kernel, width), DOUBLED_TILE)
    if features > padded:
        return DOUBLED_TILE
    narrow, middle, wide = TILES[kernel]
    return narrow if features <= 32 else middle if features <= 64 else wide


@dataclass(frozen=True)
class Plan:
    """Sizes, flags and launches for one signature.

    Args:
        rows: sequences of tokens, B * heads.
        features: width of the features of a padded head, K.
        part_shape: of one program's part of a state, or of its gradient.
        state_shape: of the state.
        is_weighted: whether keys have weights, so that `query_sums` runs.
        is_corrected: whether `key_gradient` is preceded by `key_gradient_excess`, which measures
            by how much the gradients of a softmax, rounded, fail to sum to zero.
        query_sums, ..., query_gradient: the launches.
    """

    rows: int
    features: int
    part_shape: tuple[int, int]
    state_shape: tuple[int, int, int]
    is_weighted: bool
    is_corrected: bool
    query_sums: Launch
    state: Launch
    merge: Launch
    read: Launch
    output_gradient: Launch
    merge_gradient: Launch
    key_gradient_excess: Launch
    key_gradient: Launch
    query_gradient: Launch

    def empty(self, x: Tensor, *shape: int) -> Tensor:
        """A new float32 tensor on the device of `x`."""
        return torch.empty(shape, dtype=torch.float32, device=x.device)


@cache_plan
def plan(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    feature_map: str,
    key_weights: str,
    readout: str,
    size: tuple[int, int] | None,
    local: bool,
    gate: bool,
    add: bool = False,
) -> Plan:
    """Plan for queries of one shape (B, N, heads, D).

    Args:
        shape, dtype, device: of the values.
        feature_map, key_weights, readout: as in `linear_attention`, or `signed_power` with
            `uniform` and `polarized`.
        size: height and width of the map that the rotary tables are for; None without tables.
        local, gate: whether there is such a tensor.
        add: whether the gradient of the values is added to what its tensor holds.
    """
    batch, tokens, heads, width = shape
    rows, itemsize, scale = batch * heads, dtype.itemsize, width**-0.5
    padded = padded_width(width)
    features = feature_width(padded, feature_map)
    # Rows of a state that are sums over tokens: of S, of mean k and of mean v.
    merged_rows = features + features // padded + 1
    weighted = key_weights == "global_query"
    mean_value = readout in ("magnitude_aware", "subtractive")
    table = table_sizes(size, width)
    rotary = {"ROTARY": size is not None}

    def make(kernel: str, sizes: tuple, fold: bool = False, **flags) -> Launch:
        tile = choose_tile(kernel, feature_map, features, padded, itemsize)
        splits, per_split = split_tokens(tile, rows, tokens, device, FEW_SPLITS)
        constants = {
            "D": width, "P": padded, "K": features, "BLOCK": tile.block, "MAP": feature_map,
            **flags, "num_warps": tile.warps, "num_stages": tile.stages,
            "maxnreg": min(255, REGISTERS // (tile.resident * tile.warps * 32) // 8 * 8),
        }  # fmt: skip
        if fold:
            # The rows that a program's warps load at once, 16 bytes per thread.
            constants["FOLD"] = min(tile.block, tile.warps * 512 // (padded * itemsize))
        return Launch((rows, splits), (tokens, per_split, heads, *sizes), constants)

    def make_merge(splits: int, query_splits: int, backward: bool) -> Launch:
        # Of many heads, which have few splits, a program merges a large piece; of few heads a
        # small one, so that the device is busy.
        chunk = next(size for most, size in MERGE_CHUNKS if splits <= most)
        piece = max(1, MERGE_ELEMENTS // (chunk * padded))
        constants = {
            "P": padded, "K": features, "ROWS": piece, "CHUNK": chunk,
            "WEIGHTED": weighted and not backward, "MEAN_VALUE": mean_value,
            "BACKWARD": backward, "num_warps": 4,
        }  # fmt: skip
        return Launch(
            (rows, -(-merged_rows // piece)), (tokens, splits, query_splits, scale), constants
        )

    query_sums = make("query_sums", (), fold=True)
    query_splits = query_sums.grid[1] if weighted else 0
    flags = {"WEIGHTED": weighted, "MEAN_VALUE": mean_value, **rotary}
    state = make("state", (*table, query_splits, scale), fold=True, **flags)
    reads = {"READOUT": readout, "MEAN_VALUE": mean_value, **rotary}
    read_flags = {"LOCAL": local, "GATE": gate, **reads}
    output_gradient = make("output_gradient", (*table, scale), **read_flags)
    merge_gradient = make_merge(output_gradient.grid[1], 0, backward=True)
    tile = choose_tile("key_gradient", feature_map, features, padded, itemsize)
    key_splits, _ = split_tokens(tile, rows, tokens, device, FEW_SPLITS)
    # How many programs merge the state's gradient of a head, of which each leaves a piece.
    pieces = merge_gradient.grid[1]
    corrected = weighted and dtype != torch.bfloat16

    def make_key_gradient(measure: bool) -> Launch:
        return make(
            "key_gradient", (*table, key_splits, pieces, scale),
            ADD=add, MEASURE=measure, CORRECT=corrected and not measure, **flags,
        )  # fmt: skip

    return Plan(
        rows, features, (merged_rows + 1, padded), state_shape(rows, width, feature_map),
        weighted, corrected,
        query_sums=query_sums,
        state=state,
        merge=make_merge(state.grid[1], query_splits, backward=False),
        read=make("read", (*table, scale), **read_flags),
        output_gradient=output_gradient,
        merge_gradient=merge_gradient,
        key_gradient_excess=make_key_gradient(measure=True),
        key_gradient=make_key_gradient(measure=False),
        # With a local branch, its gradient is already the product with the gate.
        query_gradient=make(
            "query_gradient", (*table, key_splits, scale),
            WEIGHTED=weighted, GATE=gate and not local, **reads,
        ),
    )  # fmt: skip


def table_sizes(size: tuple[int, int] | None, width: int) -> tuple[int, int, int, int, int]:
    """Width, its reciprocal and shift, and the floats from cosines to sines of both tables."""
    if size is None:
        return 1, 1 << 30, 30, 0, 0
    # n // width = n * reciprocal >> shift, exactly, for every n < 2^30. The reciprocal has 31 bits:
    # TorchInductor of torch 2.11 fails at a larger number.
    shift = 30 + (size[1] - 1).bit_length()
    reciprocal = -(-(1 << shift) // size[1])
    quarter = width // 4
    return size[1], reciprocal, shift, size[0] * quarter, size[1] * quarter
