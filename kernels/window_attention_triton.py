"""The Triton kernels of `window_attention`: their tiles, their launches.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import window_attention_streamed_triton as streamed
from .triton_launch import launch, multiprocessors
from .window_attention import largest_tile
from .window_attention_backward_triton import _gradient, _sum_pairs, _weight_gradient
from .window_attention_forward_triton import _attend

# Queries, and keys, of a tile of a streamed window, at most.
STREAMED_TILE = 64
# Programs that a multiprocessor holds at once, by their registers.
RESIDENT = 3
RESIDENT_BACKWARD = 2


def _parts_of(length: int, size: int) -> int:
    return -(-length // size)  # triton.cdiv costs more than a launch's arguments


def _power_of_2(length: int) -> int:
    return 1 << (length - 1).bit_length()


@dataclass(frozen=True)
class Branch:
    """The windows of one size, and the heads that attend in them."""

    sizes: dict[str, int]
    total: int
    tokens: int
    head: int
    share: int
    tile: int
    streamed: bool
    rows_kept: slice

    def plan(
        self, units: int, resident: int, device: torch.device, programs_each: int = 1
    ) -> tuple[int, int]:
        """Groups, and units of work a group, that fill the device once."""
        slots = max(1, resident * multiprocessors(device) // (self.share * programs_each))
        per = _parts_of(units, slots)
        return _parts_of(units, per), per

    def scalars(self, per: int, tiles: int) -> dict[str, int]:
        return self.sizes | {
            "total": self.total,
            "per": per,
            "tiles": tiles,
            "head": self.head,
            "share": self.share,
        }


class Problem:
    """What the launches share: shapes, tiles and the places of the windows."""

    def __init__(
        self,
        projection: Tensor,
        table: Tensor | None,
        fill: Tensor | None,
        weight: Tensor | None,
        heads: int,
        windows: Sequence[int],
        shift: Sequence[int],
        padding: str,
    ) -> None:
        self.batch, self.height, self.width, packed = projection.shape
        self.channels, self.heads = packed // 3, heads
        self.device = projection.device
        self.head_dim = self.channels // heads
        self.padded_dim = max(16, _power_of_2(self.head_dim))
        self.kernel = 0 if weight is None else weight.shape[-1]
        self.table_size = (0, 0) if table is None else tuple(table.shape[:2])
        self.shift = tuple(shift)
        self.padding = padding
        self.stages = 1 if projection.dtype == torch.float32 else 2
        limit = largest_tile(projection, heads, table)
        self.branches = list(self._branches(windows, limit))
        pads = any(
            b.total * b.tokens != self.batch * self.height * self.width for b in self.branches
        )
        self.filled = fill is not None and pads

    def _branches(self, windows: Sequence[int], limit: int) -> Iterator[Branch]:
        share = self.heads // (len(windows) // 2)
        kept = 0
        for i, (wh, ww) in enumerate(zip(windows[::2], windows[1::2], strict=True)):
            rows, columns = _parts_of(self.height, wh), _parts_of(self.width, ww)
            height, width = rows * wh, columns * ww
            centre = self.padding == "centre"
            after = self.padding == "end_after_shift"
            sizes = {
                "height": self.height,
                "width": self.width,
                "rows": rows,
                "columns": columns,
                "wh": wh,
                "ww": ww,
                "sh": self.shift[0],
                "sw": self.shift[1],
                "top": (height - self.height) // 2 if centre else 0,
                "left": (width - self.width) // 2 if centre else 0,
                "period_h": self.height if after else height,
                "period_w": self.width if after else width,
            }
            tokens, total = wh * ww, self.batch * rows * columns
            is_streamed = tokens > limit
            tile = min(limit, STREAMED_TILE) if is_streamed else _power_of_2(tokens)
            tile = max(16, tile)
            size = total * tokens * share if is_streamed else 0
            rows_kept = slice(kept, kept + size)
            kept += size
            yield Branch(sizes, total, tokens, i * share, share, tile, is_streamed, rows_kept)

    def common(self) -> dict[str, int | float]:
        return {
            "channels": self.channels,
            "heads": self.heads,
            "scale": self.head_dim**-0.5,
            "D": self.head_dim,
            "P": self.padded_dim,
            "ROWS": self.table_size[0],
            "COLUMNS": self.table_size[1],
            "FILL": self.filled,
            "SHIFT": any(self.shift),
        }

    def tuning(self, tile: int) -> dict[str, int]:
        return {"num_warps": 8 if tile > 64 else 4, "num_stages": self.stages}


def forward(
    problem: Problem,
    projection: Tensor,
    table: Tensor | None,
    fill: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    sums: Tensor,
) -> None:
    """Write the attention's result to `out`, and of streamed windows what backward needs."""
    table, fill, weight = (projection if x is None else x for x in (table, fill, weight))
    for branch in problem.branches:
        tiles = _parts_of(branch.tokens, branch.tile)
        groups, per = (
            (branch.total, 1)
            if branch.streamed
            else branch.plan(branch.total, RESIDENT, problem.device)
        )
        launch(
            _attend, (groups * tiles * branch.share,),
            projection, table, fill, weight, projection if bias is None else bias, out,
            sums[branch.rows_kept], *projection.stride()[:3], *out.stride()[:3],
            **branch.scalars(per, tiles), **problem.common(), T=branch.tile,
            STREAMED=branch.streamed, K=problem.kernel, BIAS=bias is not None,
            **problem.tuning(branch.tile),
        )  # fmt: skip


def backward(
    problem: Problem,
    grad: Tensor,
    projection: Tensor,
    table: Tensor | None,
    fill: Tensor | None,
    weight: Tensor | None,
    sums: Tensor,
    out: Tensor,
) -> tuple[Tensor | None, ...]:
    """Write the projection's gradient to `out`; those of table, fill, weight and bias."""
    tensors = [projection if x is None else x for x in (table, fill, weight)]
    dtable, dfill, dweight, dbias = None, None, None, None
    if fill is not None:
        dfill = torch.zeros(3, problem.channels, dtype=torch.float32, device=problem.device)
    if weight is not None:
        dweight, dbias = _weight_gradients(problem, grad, projection, tensors[1])
    for branch in problem.branches:
        run = _backward_streamed if branch.streamed else _backward_whole
        pairs, filled = run(problem, branch, grad, projection, *tensors, sums, out)
        if problem.filled:
            owned = slice(
                branch.head * problem.head_dim,
                (branch.head + branch.share) * problem.head_dim,
            )
            dfill[1:, owned] = filled.sum(0)[:, owned]
        if table is not None:
            dtable = _table_gradient(problem, branch, pairs.sum(0), table)
    return dtable, None if dfill is None else dfill.flatten(), dweight, dbias


def _parts(problem: Problem, groups: int, side: int, fills: int) -> tuple[Tensor, Tensor]:
    """Empty parts of the gradients of the table and of the fill."""
    pairs = (groups, problem.heads, side, side) if problem.table_size[0] else (0,)
    filled = (fills, 2, problem.channels) if problem.filled else (0,)
    return tuple(
        torch.empty(shape, dtype=torch.float32, device=problem.device) for shape in (pairs, filled)
    )


def _backward_whole(problem, branch, grad, projection, table, fill, weight, sums, out):
    groups, per = branch.plan(branch.total, RESIDENT_BACKWARD, problem.device)
    pairs, filled = _parts(problem, groups, branch.tile, groups)
    launch(
        _gradient, (groups * branch.share,),
        projection, table, fill, weight, grad, out, pairs, filled,
        *projection.stride()[:3], *grad.stride()[:3], *out.stride()[:3],
        **branch.scalars(per, 1), **problem.common(), T=branch.tile, K=problem.kernel,
        **problem.tuning(branch.tile),
    )  # fmt: skip
    return pairs, filled


def _backward_streamed(problem, branch, grad, projection, table, fill, weight, sums, out):
    tiles = _parts_of(branch.tokens, branch.tile)
    groups, per = branch.plan(branch.total, RESIDENT_BACKWARD, problem.device, tiles * tiles)
    pairs, filled = _parts(problem, groups, tiles * branch.tile, branch.total * tiles)
    kept = sums[branch.rows_kept]
    inner = torch.empty(kept.shape, dtype=torch.float32, device=problem.device)
    strides = (*projection.stride()[:3], *grad.stride()[:3])
    common = problem.common() | {"T": branch.tile} | problem.tuning(branch.tile)
    launch(
        streamed.query_gradient, (branch.total * tiles * branch.share,),
        projection, table, fill, grad, out, kept, inner, *strides, *out.stride()[:3],
        **branch.scalars(1, tiles), **common,
    )  # fmt: skip
    launch(
        streamed.key_gradient, (branch.total * tiles * branch.share,),
        projection, table, fill, weight, grad, out, kept, inner, filled,
        *strides, *out.stride()[:3], **branch.scalars(1, tiles), **common, K=problem.kernel,
    )  # fmt: skip
    if problem.table_size[0]:
        launch(
            streamed.bias_gradient, (groups * tiles * tiles * branch.share,),
            projection, table, fill, grad, kept, inner, pairs, *strides,
            **branch.scalars(per, tiles), **common,
        )  # fmt: skip
    return pairs, filled


def _table_gradient(problem: Problem, branch: Branch, pairs: Tensor, table: Tensor) -> Tensor:
    """The sum over equal offsets of the scores' gradient (heads, side, side)."""
    rows, columns = problem.table_size
    result = torch.empty(table.shape, dtype=torch.float32, device=problem.device)
    launch(
        _sum_pairs, (_parts_of(rows * columns, 32), problem.heads),
        pairs, result, branch.sizes["wh"], branch.sizes["ww"], pairs.shape[-1], problem.heads,
        ROWS=rows, COLUMNS=columns, OFFSETS=32, QUERIES=64,
    )  # fmt: skip
    return result


def _weight_gradients(
    problem: Problem, grad: Tensor, projection: Tensor, fill: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the convolution's weight (C, 1, k, k) and bias, in float32."""
    taps = problem.kernel**2
    total = torch.empty(taps + 1, problem.channels, dtype=torch.float32, device=problem.device)
    common = {key: problem.common()[key] for key in ("channels", "D", "P", "FILL")}
    for branch in problem.branches:
        tile = 16 if problem.kernel > 3 else 32
        tiles = _parts_of(branch.tokens, tile)
        groups, per = branch.plan(branch.total * tiles, RESIDENT, problem.device)
        parts = torch.empty(
            (groups, taps + 1, problem.channels), dtype=torch.float32, device=problem.device
        )
        launch(
            _weight_gradient, (groups * branch.share,),
            projection, fill, grad, parts, *projection.stride()[:3], *grad.stride()[:3],
            **branch.scalars(per, tiles), **common, T=tile, K=problem.kernel,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        owned = slice(
            branch.head * problem.head_dim, (branch.head + branch.share) * problem.head_dim
        )
        total[:, owned] = parts[..., owned].sum(0)
    shape = (problem.channels, 1, problem.kernel, problem.kernel)
    return total[:taps].t().reshape(shape).contiguous(), total[taps].clone()
