"""The launch decisions of `gaussian_attention`, and the order of its kernels.

With K the Gaussian kernel of queries and landmarks, recomputed wherever it is needed, A the
inverse, u = K^T v and w = A u (both M x D), y = K w; and in the backward pass, from dy,
dw = K^T dy, du = A^T dw:

    forward     gather           u, partial, per split of the tokens
                apply            u summed over the splits in a fixed order, w
                scatter          y
    backward    gather           dw, partial
                apply            dw, du, dA = dw u^T
                token gradient   dv = K du;  dq, from E = (dy w^T + v du^T) * K
                landmark gradient   dl, from E^T; up to 64 landmarks it is part of the former

dq_i = s sum_j E_ij (l_j - s q_i) and dl_j = sum_i E_ij (s q_i - l_j), s the scale. A landmark
or token that is not there reads as zero in v, dy, u and w, so that its entry of K is multiplied
by zero.

Nothing of size N is stored besides inputs and outputs. Every sum has a fixed order.
"""

from dataclasses import dataclass

import torch

from ..runtime.launch import Launch, Tile, cache_plan, pad_size, split_tokens

# By kernel and padded head width, for 16-bit inputs; chosen by registers and spills in the
# machine code.
TILES = {
    "gather": {32: Tile(64, 4, 2, 4, 128), 64: Tile(64, 4, 2, 4, 128), 128: Tile(64, 8, 1, 1, 256)},
    "scatter": {32: Tile(64, 4, 2, 4, 64), 64: Tile(64, 4, 2, 3, 64), 128: Tile(64, 8, 1, 1, 128)},
    "token_gradient": {
        32: Tile(64, 4, 1, 2, 128),
        64: Tile(32, 4, 1, 2, 128),
        128: Tile(32, 8, 1, 1, 128),
    },
    "landmark_gradient": {
        32: Tile(64, 4, 1, 3, 128),
        64: Tile(32, 4, 1, 2, 128),
        128: Tile(32, 8, 1, 1, 256),
    },
}
# float32 multiplies without tensor cores, and holds its operands in registers.
WIDE_TILES = {32: Tile(16, 8, 1, 2, 64), 64: Tile(16, 8, 1, 2, 64), 128: Tile(16, 16, 1, 1, 64)}
# The most landmarks of a program.
MOST_LANDMARKS = 64


def choose_tile(kernel: str, padded: int, itemsize: int) -> Tile:
    """The tile of a kernel by head width and dtype."""
    tiles = WIDE_TILES if itemsize == 4 else TILES[kernel]
    return tiles[max(32, padded)]


@dataclass(frozen=True)
class Plan:
    """Sizes and launches for one signature.

    Args:
        rows: sequences of tokens, B * heads.
        marks: landmarks, M.
        padded: the padded width of a head, P.
        is_whole: whether a program holds all landmarks; then `token_gradient` makes their
            gradient, too, and `landmark_gradient` is not launched.
        gather, apply, apply_backward, scatter, token_gradient, landmark_gradient: the launches.
    """

    rows: int
    marks: int
    padded: int
    is_whole: bool
    gather: Launch
    apply: Launch
    apply_backward: Launch
    scatter: Launch
    token_gradient: Launch
    landmark_gradient: Launch


@cache_plan
def plan(
    shape: torch.Size,
    marks: int,
    scale: float,
    local: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """Plan for queries of one shape (B, N, heads, D) and `marks` landmarks."""
    batch, tokens, heads, width = shape
    rows, padded = batch * heads, pad_size(width)
    block = min(MOST_LANDMARKS, pad_size(marks))
    blocks = -(-marks // block)
    is_whole = blocks == 1

    def make(kernel: str, blocks: int | None = None, **flags: bool) -> Launch:
        tile = choose_tile(kernel, padded, dtype.itemsize)
        splits, each = split_tokens(tile, rows * (blocks or 1), tokens, device)
        constants = {
            "D": width, "P": padded, "BLOCK": tile.block, "BM": block, **flags,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        grid = (rows, splits) if blocks is None else (rows, splits, blocks)
        return Launch(grid, (tokens, each, marks, heads, scale), constants)

    def make_apply(splits: int, backward: bool) -> Launch:
        constants = {
            "P": padded, "BM": block, "BACKWARD": backward, "num_warps": 4, "num_stages": 1,
        }  # fmt: skip
        return Launch((rows, blocks), (splits, marks), constants)

    gather = make("gather", blocks)
    return Plan(
        rows, marks, padded, is_whole,
        gather=gather,
        apply=make_apply(gather.grid[1], backward=False),
        apply_backward=make_apply(gather.grid[1], backward=True),
        scatter=make("scatter", WHOLE=is_whole, LOCAL=local),
        token_gradient=make("token_gradient", WHOLE=is_whole),
        landmark_gradient=make("landmark_gradient", blocks),
    )  # fmt: skip
