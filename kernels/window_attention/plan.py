"""The launch decisions of `window_attention`, and how its kernels go through the windows.

A token's place in the map is arithmetic on its number (`locate`), so that the packed
projection is read where it lies and the packed gradient is written there.

A window of at most one tile is one step of a program, which goes through several windows of one
head: their position bias stays in registers, and so does the sum of its gradient. The backward
pass recomputes the softmax and has q, k, v and the result's gradient in hand at once, so that
every element is read once and written once: (3 C + C) + C forward, (3 C + C) + 3 C backward.

A larger window is streamed over its keys (forward, dq) or queries (dk, dv), and the
logarithms of the softmax's sums, 4 bytes a token and head, are kept for the backward pass.

No float is added atomically: what several programs contribute to is stored in parts and summed
in a fixed order.
"""

from dataclasses import dataclass

import torch

from ..runtime.launch import Launch, cache_plan, count_multiprocessors, pad_size

# The most queries, and keys, of a tile of a streamed window.
STREAMED_TILE = 64
# Programs that a multiprocessor holds at once, which their registers decide.
RESIDENT = 3
RESIDENT_BACKWARD = 2


@dataclass(frozen=True)
class Branch:
    """The windows of one size, and the heads that attend in them.

    Args:
        is_streamed: whether a window is more than one tile.
        sums: where the logarithms of a streamed window's softmax are in `sums`.
        channels: the channels of the heads.
        pair_parts, fill_parts: shapes of the parts of the gradients of table and fill.
        weight_parts: the shape of the parts of the gradients of weight and bias.
        attend, ..., weight_gradient: the launches. A branch is either streamed, with
            `query_gradient`, `key_gradient` and `bias_gradient`, or has `gradient`.
    """

    is_streamed: bool
    sums: slice
    channels: slice
    pair_parts: tuple[int, ...]
    fill_parts: tuple[int, ...]
    weight_parts: tuple[int, ...]
    attend: Launch
    gradient: Launch | None
    query_gradient: Launch | None
    key_gradient: Launch | None
    bias_gradient: Launch | None
    sum_pairs: Launch
    weight_gradient: Launch


@dataclass(frozen=True)
class Plan:
    """Sizes and branches for one signature.

    Args:
        channels: C.
        kernel: the side of the local branch's window, 0 without one.
        is_filled: whether there is padding, and a fill for it.
        branches: one per size of windows.
    """

    channels: int
    kernel: int
    is_filled: bool
    branches: tuple[Branch, ...]


@cache_plan
def plan(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    windows: tuple[int, ...],
    shift: tuple[int, int],
    padding: str,
    table: tuple[int, int] | None,
    fill: bool,
    kernel: int,
    bias: bool,
    limit: int,
) -> Plan:
    """Plan for projections of one shape (B, H, W, 3 C).

    Args:
        shape, dtype, device: of the projection.
        heads, shift, padding: as in `window_attention`.
        windows: rows and columns of each size of windows, one after the other.
        table: the sides of the table; None without one.
        fill, bias: whether there is such a tensor.
        kernel: the side of the local branch's window, 0 without one.
        limit: the most tokens of a window that is one tile.
    """
    batch, height, width, packed = shape
    channels = packed // 3
    head_dim = channels // heads
    sizes = list(zip(windows[::2], windows[1::2], strict=True))
    share = heads // len(sizes)
    counts = [(-(-height // wh), -(-width // ww)) for wh, ww in sizes]
    is_filled = fill and any(
        rows * wh != height or columns * ww != width
        for (rows, columns), (wh, ww) in zip(counts, sizes, strict=True)
    )
    stages = 1 if dtype == torch.float32 else 2
    common = {"D": head_dim, "P": pad_size(head_dim), "FILL": is_filled}
    sides = table or (0, 0)
    scores = {
        "ROWS": sides[0], "COLUMNS": sides[1], "SHIFT": any(shift), **common,
    }  # fmt: skip

    def fill_device(units: int, resident: int, programs: int = 1) -> tuple[int, int]:
        """Groups, and units of work per group, of `programs` each, that fill the device once."""
        slots = max(1, resident * count_multiprocessors(device) // (share * programs))
        per = max(1, -(-units // slots))
        return -(-units // per), per

    def make_branch(index: int, first: int) -> Branch:
        (wh, ww), (rows, columns) = sizes[index], counts[index]
        head = index * share
        tokens, total = wh * ww, batch * rows * columns
        place = _place_windows(height, width, rows * wh, columns * ww, padding)
        geometry = (height, width, rows, columns, wh, ww, *shift, *place)
        is_streamed = tokens > limit
        tile = min(limit, STREAMED_TILE) if is_streamed else pad_size(tokens)
        tiles = -(-tokens // tile)
        tuning = {"T": tile, "num_warps": 8 if tile > 64 else 4, "num_stages": stages}

        def make(programs: int, per: int, tiles: int, **constants) -> Launch:
            run_time = (channels, heads, head_dim**-0.5, *geometry, total, per, tiles, head, share)
            return Launch((programs * share,), run_time, {**scores, **constants, **tuning})

        if is_streamed:
            groups, per = fill_device(total, RESIDENT_BACKWARD, tiles * tiles)
            side, fills = tiles * tile, total * tiles
            attend_groups, attend_per = total, 1
        else:
            groups, per = fill_device(total, RESIDENT_BACKWARD)
            side, fills = tile, groups
            attend_groups, attend_per = fill_device(total, RESIDENT)
        gradient = query_gradient = key_gradient = bias_gradient = None
        if is_streamed:
            query_gradient = make(total * tiles, 1, tiles)
            key_gradient = make(total * tiles, 1, tiles, K=kernel)
            bias_gradient = make(groups * tiles * tiles, per, tiles)
        else:
            gradient = make(groups, per, 1, K=kernel)

        weight_tile = 16 if kernel > 3 else 32
        weight_tiles = -(-tokens // weight_tile)
        weight_groups, weight_per = fill_device(total * weight_tiles, RESIDENT)
        return Branch(
            is_streamed,
            sums=slice(first, first + total * tokens * share if is_streamed else first),
            channels=slice(head * head_dim, (head + share) * head_dim),
            pair_parts=(groups, heads, side, side) if table else (0,),
            fill_parts=(fills, 2, channels) if is_filled else (0,),
            weight_parts=(weight_groups, kernel * kernel + 1, channels),
            attend=make(
                attend_groups * tiles, attend_per, tiles, STREAMED=is_streamed, K=kernel, BIAS=bias
            ),
            gradient=gradient,
            query_gradient=query_gradient,
            key_gradient=key_gradient,
            bias_gradient=bias_gradient,
            sum_pairs=Launch(
                (-(-(sides[0] * sides[1]) // 32), heads), (wh, ww, side, heads),
                {"ROWS": sides[0], "COLUMNS": sides[1], "OFFSETS": 32, "QUERIES": 64},
            ),
            weight_gradient=Launch(
                (weight_groups * share,),
                (channels, *geometry, total, weight_per, weight_tiles, head, share),
                {**common, "T": weight_tile, "K": kernel, "num_warps": 4, "num_stages": 1},
            ),
        )  # fmt: skip

    branches = []
    for index in range(len(sizes)):
        branches.append(make_branch(index, branches[-1].sums.stop if branches else 0))
    return Plan(channels, kernel, is_filled, tuple(branches))


def _place_windows(
    height: int, width: int, padded_height: int, padded_width: int, padding: str
) -> tuple[int, int, int, int]:
    """Rows above and columns left of the map, and the two periods of the roll."""
    centre = padding == "centre"
    top = (padded_height - height) // 2 if centre else 0
    left = (padded_width - width) // 2 if centre else 0
    if padding == "end_after_shift":
        return top, left, height, width
    return top, left, padded_height, padded_width
