"""The Triton kernels of `gaussian_attention`, forward and backward.

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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .landmark_kernel_triton import half_square, padded_size, rows_of
from .triton_launch import Tile, launch, multiprocessors, split_tokens
from .triton_math import (
    PRECISION,
    dot,
    dot_halves,
    exponential,
    high_part,
    low_part,
    multiply,
    operand,
)


@triton.jit
def _representable(e, IEEE: tl.constexpr):
    """The nearest that `_weigh` multiplies exactly: the sum of two bfloat16, 16 bits."""
    if IEEE:
        return e
    else:
        return high_part(e, IEEE).to(tl.float32) + low_part(e, IEEE).to(tl.float32)


@triton.jit
def _weigh(e, x, accumulator, IEEE: tl.constexpr):
    """accumulator + e @ x, no product left out: of sum_j E_ij (l_j - q_i), where a token is its
    own landmark, both terms are large and must cancel."""
    if IEEE or x.dtype == tl.bfloat16:
        return dot(e, x, accumulator, IEEE)
    else:
        x = x.to(tl.float32)
        accumulator = dot_halves(e, high_part(x, IEEE), low_part(x, IEEE), accumulator, IEEE)
        return multiply(low_part(e, IEEE), low_part(x, IEEE), accumulator)


_SCALARS = ["tokens", "per_split", "splits", "marks", "heads", "rows"]


@triton.jit(do_not_specialize=_SCALARS)
def _gather(
    q, k, x, parts,
    q_b, q_n, q_h, k_b, k_n, k_h, x_b, x_n, x_h,
    tokens, per_split, marks, heads, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One split's part of K^T x: BM landmarks of one head a program."""
    bh = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.program_id(2) * BM
    IEEE: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    x += b * x_b + h * x_h
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    mark = rows_of(k, m, marks, k_n, D, P, BM)
    mark_half = half_square(mark)[:, None]
    total = tl.zeros((BM, P), tl.float32)
    for start in range(first, last, BLOCK):
        query = rows_of(q, start, last, q_n, D, P, BLOCK)
        y = operand(rows_of(x, start, last, x_n, D, P, BLOCK), IEEE)
        score = scale * multiply(mark, tl.trans(query)) - mark_half
        score -= scale * scale * half_square(query)[None, :]
        total = dot(exponential(score, IEEE), y, total, IEEE)
    row = m + tl.arange(0, BM)
    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * marks * P
    at = row[:, None] * P + tl.arange(0, P)[None, :]
    tl.store(parts + at, total, mask=(row < marks)[:, None])


@triton.jit
def _sum_parts(parts, m, splits, marks, P: tl.constexpr, BM: tl.constexpr):
    """The splits' parts of BM landmarks, summed in a fixed order."""
    row = m + tl.arange(0, BM)
    at = row[:, None] * P + tl.arange(0, P)[None, :]
    total = tl.zeros((BM, P), tl.float32)
    for _ in range(splits):
        total += tl.load(parts + at, mask=(row < marks)[:, None], other=0.0)
        parts += marks * P
    return total


@triton.jit(do_not_specialize=_SCALARS)
def _apply(
    parts, inverse, u, total, product, dinverse, splits, marks,
    P: tl.constexpr, BM: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """total = the sum of the parts, product = inverse @ total: BM rows of one head a program.

    Backward, product = inverse^T @ total and dinverse = total @ u^T.
    """
    bh = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BM
    parts += bh * splits * marks * P
    inverse += bh * marks * marks
    u += bh * marks * P
    total += bh * marks * P
    product += bh * marks * P
    dinverse += bh * marks * marks
    row = m + tl.arange(0, BM)
    live = (row < marks)[:, None]
    d = tl.arange(0, P)[None, :]
    own = _sum_parts(parts, m, splits, marks, P, BM)
    tl.store(total + row[:, None] * P + d, own, mask=live)
    result = tl.zeros((BM, P), tl.float32)
    for start in range(0, marks, BM):
        column = start + tl.arange(0, BM)
        mask = live & (column < marks)[None, :]
        if BACKWARD:
            at = column[None, :].to(tl.int64) * marks + row[:, None]
        else:
            at = row[:, None].to(tl.int64) * marks + column[None, :]
        a = tl.load(inverse + at, mask=mask, other=0.0)
        other = _sum_parts(parts, start, splits, marks, P, BM)
        result = tl.dot(a, other, result, input_precision=PRECISION)
        if BACKWARD:
            gathered = tl.load(
                u + column[:, None] * P + d, mask=(column < marks)[:, None], other=0.0
            )
            gradient = tl.dot(own, tl.trans(gathered), input_precision=PRECISION)
            at = row[:, None].to(tl.int64) * marks + column[None, :]
            tl.store(dinverse + at, gradient, mask=mask)
    tl.store(product + row[:, None] * P + d, result, mask=live)


@triton.jit(do_not_specialize=_SCALARS)
def _scatter(
    q, k, w, local, out,
    q_b, q_n, q_h, k_b, k_n, k_h, c_b, c_n, c_h, o_b, o_n, o_h,
    tokens, per_split, marks, heads, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    WHOLE: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """y = K w + local; WHOLE says that all landmarks fit in BM and are read once."""
    bh = tl.program_id(0)
    split = tl.program_id(1)
    IEEE: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    local += b * c_b + h * c_h
    out += b * o_b + h * o_h
    w += bh.to(tl.int64) * marks * P
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    d = tl.arange(0, P)[None, :]
    if WHOLE:
        mark = rows_of(k, 0, marks, k_n, D, P, BM)
        weight = rows_of(w, 0, marks, P, P, P, BM)
        mark_half = half_square(mark)[None, :]
        high = high_part(weight, IEEE)
        low = low_part(weight, IEEE)
    for start in range(first, last, BLOCK):
        query = rows_of(q, start, last, q_n, D, P, BLOCK)
        query_half = scale * scale * half_square(query)[:, None]
        y = tl.zeros((BLOCK, P), tl.float32)
        if WHOLE:
            score = scale * multiply(query, tl.trans(mark)) - query_half - mark_half
            y = dot_halves(exponential(score, IEEE), high, low, y, IEEE)
        else:
            for m in range(0, marks, BM):
                mark = rows_of(k, m, marks, k_n, D, P, BM)
                weight = rows_of(w, m, marks, P, P, P, BM)
                score = scale * multiply(query, tl.trans(mark)) - query_half
                score -= half_square(mark)[None, :]
                y = dot(exponential(score, IEEE), weight, y, IEEE)
        n = start + tl.arange(0, BLOCK)
        mask = (n < last)[:, None] & (d < D)
        if LOCAL:
            at = n.to(tl.int64)[:, None] * c_n + d
            y += tl.load(local + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + n.to(tl.int64)[:, None] * o_n + d, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tile_gradient(
    query, value, dy, query_half, mark, weight, du, dvalue, dquery, mass, scale,
    IEEE: tl.constexpr,
):  # fmt: skip
    """One tile's E, and dv, dq / s + s sum(E) q and sum(E) with its part added."""
    score = scale * multiply(query, tl.trans(mark)) - query_half - half_square(mark)[None, :]
    kernel = exponential(score, IEEE)
    e = tl.zeros((query.shape[0], mark.shape[0]), tl.float32)
    e = dot(operand(dy, IEEE), tl.trans(weight), e, IEEE)
    e = dot(operand(value, IEEE), tl.trans(du), e, IEEE)
    dvalue = dot(kernel, du, dvalue, IEEE)
    e = _representable(e * kernel, IEEE)
    dquery = _weigh(e, mark, dquery, IEEE)
    return e, dvalue, dquery, mass + tl.sum(e, 1)


@triton.jit(do_not_specialize=_SCALARS)
def _token_gradient(
    q, k, v, grad, w, d_u, dq, dv, parts,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h,
    dq_b, dq_n, dq_h, dv_b, dv_n, dv_h,
    tokens, per_split, marks, heads, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """dq and dv of one split's tokens; if WHOLE, its part of dl as well."""
    bh = tl.program_id(0)
    split = tl.program_id(1)
    IEEE: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    grad += b * g_b + h * g_h
    dq += b * dq_b + h * dq_h
    dv += b * dv_b + h * dv_h
    w += bh.to(tl.int64) * marks * P
    d_u += bh.to(tl.int64) * marks * P
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    d = tl.arange(0, P)[None, :]
    if WHOLE:
        mark = rows_of(k, 0, marks, k_n, D, P, BM)
        weight = rows_of(w, 0, marks, P, P, P, BM)
        du = rows_of(d_u, 0, marks, P, P, P, BM)
        dmark = tl.zeros((BM, P), tl.float32)
        mark_mass = tl.zeros((BM,), tl.float32)
    for start in range(first, last, BLOCK):
        query = rows_of(q, start, last, q_n, D, P, BLOCK)
        value = rows_of(v, start, last, v_n, D, P, BLOCK)
        dy = rows_of(grad, start, last, g_n, D, P, BLOCK)
        query_half = scale * scale * half_square(query)[:, None]
        dvalue = tl.zeros((BLOCK, P), tl.float32)
        dquery = tl.zeros((BLOCK, P), tl.float32)
        mass = tl.zeros((BLOCK,), tl.float32)
        if WHOLE:
            e, dvalue, dquery, mass = _tile_gradient(
                query, value, dy, query_half, mark, weight, du, dvalue, dquery, mass, scale, IEEE
            )
            dmark = _weigh(tl.trans(e), query, dmark, IEEE)
            mark_mass += tl.sum(e, 0)
        else:
            for m in range(0, marks, BM):
                _, dvalue, dquery, mass = _tile_gradient(
                    query, value, dy, query_half,
                    rows_of(k, m, marks, k_n, D, P, BM),
                    rows_of(w, m, marks, P, P, P, BM),
                    rows_of(d_u, m, marks, P, P, P, BM),
                    dvalue, dquery, mass, scale, IEEE,
                )  # fmt: skip
        dquery = scale * (dquery - (scale * mass)[:, None] * query.to(tl.float32))
        n = start + tl.arange(0, BLOCK)
        at = n.to(tl.int64)[:, None]
        mask = (n < last)[:, None] & (d < D)
        tl.store(dq + at * dq_n + d, dquery.to(dq.dtype.element_ty), mask=mask)
        tl.store(dv + at * dv_n + d, dvalue.to(dv.dtype.element_ty), mask=mask)
    if WHOLE:
        dmark = scale * dmark - mark_mass[:, None] * mark.to(tl.float32)
        row = tl.arange(0, BM)[:, None]
        parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * marks * P
        tl.store(parts + row * P + d, dmark, mask=row < marks)


@triton.jit(do_not_specialize=_SCALARS)
def _landmark_gradient(
    q, k, v, grad, w, d_u, parts,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h,
    tokens, per_split, marks, heads, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One split's part of dl, of BM landmarks a program."""
    bh = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.program_id(2) * BM
    IEEE: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    grad += b * g_b + h * g_h
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    mark = rows_of(k, m, marks, k_n, D, P, BM)
    mark_half = half_square(mark)[:, None]
    weight = rows_of(w + bh.to(tl.int64) * marks * P, m, marks, P, P, P, BM)
    du = rows_of(d_u + bh.to(tl.int64) * marks * P, m, marks, P, P, P, BM)
    dmark = tl.zeros((BM, P), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for start in range(first, last, BLOCK):
        query = rows_of(q, start, last, q_n, D, P, BLOCK)
        value = operand(rows_of(v, start, last, v_n, D, P, BLOCK), IEEE)
        dy = operand(rows_of(grad, start, last, g_n, D, P, BLOCK), IEEE)
        score = scale * multiply(mark, tl.trans(query)) - mark_half
        score -= scale * scale * half_square(query)[None, :]
        e = tl.zeros((BM, BLOCK), tl.float32)
        e = dot(weight, tl.trans(dy), e, IEEE)
        e = dot(du, tl.trans(value), e, IEEE)
        e = _representable(e * exponential(score, IEEE), IEEE)
        dmark = _weigh(e, query, dmark, IEEE)
        mass += tl.sum(e, 1)
    dmark = scale * dmark - mass[:, None] * mark.to(tl.float32)
    row = (m + tl.arange(0, BM))[:, None]
    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * marks * P
    tl.store(parts + row * P + tl.arange(0, P)[None, :], dmark, mask=row < marks)


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
MOST_LANDMARKS = 64  # a program


def choose_tile(kernel: str, padded: int, itemsize: int) -> Tile:
    """The tile of a kernel by head width and dtype."""
    tiles = WIDE_TILES if itemsize == 4 else TILES[kernel]
    return tiles[max(32, padded)]


class _Problem:
    """One call's sizes, and the launch of each kernel."""

    def __init__(self, query: Tensor, landmarks: Tensor, scale: float):
        self.batch, self.tokens, self.heads, self.width = query.shape
        self.marks = landmarks.shape[1]
        self.rows = self.batch * self.heads
        self.padded = padded_size(self.width)
        self.block = min(MOST_LANDMARKS, padded_size(self.marks))
        self.blocks = -(-self.marks // self.block)
        self.query, self.landmarks, self.scale = query, landmarks, scale

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.query.device)

    def layout(self, kernel: str, blocks: int = 1) -> tuple[tuple[int, int], dict]:
        """Splits and tokens a split, and the options that the kernels share."""
        tile = choose_tile(kernel, self.padded, self.query.element_size())
        device = multiprocessors(self.query.device)
        return split_tokens(tile, self.rows * blocks, self.tokens, device), {
            "D": self.width,
            "P": self.padded,
            "BLOCK": tile.block,
            "BM": self.block,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def gather(self, x: Tensor) -> Tensor:
        (splits, each), options = self.layout("gather", self.blocks)
        parts = self.empty(self.rows, splits, self.marks, self.padded)
        launch(
            _gather, (self.rows, splits, self.blocks),
            self.query, self.landmarks, x, parts,
            *self.query.stride()[:3], *self.landmarks.stride()[:3], *x.stride()[:3],
            self.tokens, each, self.marks, self.heads, self.scale, **options,
        )  # fmt: skip
        return parts

    def apply(
        self,
        parts: Tensor,
        inverse: Tensor,
        total: Tensor,
        product: Tensor,
        u: Tensor | None = None,
        dinverse: Tensor | None = None,
    ) -> None:
        backward = u is not None
        launch(
            _apply, (self.rows, self.blocks),
            parts, inverse, u if backward else parts, total, product,
            dinverse if backward else parts, parts.shape[1], self.marks,
            P=self.padded, BM=self.block, BACKWARD=backward, num_warps=4, num_stages=1,
        )  # fmt: skip

    def scatter(self, w: Tensor, local: Tensor | None, out: Tensor) -> None:
        (splits, each), options = self.layout("scatter")
        launch(
            _scatter, (self.rows, splits),
            self.query, self.landmarks, w, out if local is None else local, out,
            *self.query.stride()[:3], *self.landmarks.stride()[:3],
            *((0, 0, 0) if local is None else local.stride()[:3]), *out.stride()[:3],
            self.tokens, each, self.marks, self.heads, self.scale,
            WHOLE=self.blocks == 1, LOCAL=local is not None, **options,
        )  # fmt: skip

    def gradients(
        self, value: Tensor, grad: Tensor, w: Tensor, du: Tensor, dquery: Tensor, dvalue: Tensor
    ) -> Tensor:
        """Write the gradients of query and value; return those of the landmarks, in parts."""
        (splits, each), options = self.layout("token_gradient")
        whole = self.blocks == 1
        parts = self.empty(self.rows, splits, self.marks, self.padded) if whole else w
        inputs = (self.query, self.landmarks, value, grad, w, du)
        strides = [
            stride for x in (self.query, self.landmarks, value, grad) for stride in x.stride()[:3]
        ]
        sizes = (self.marks, self.heads, self.scale)
        launch(
            _token_gradient, (self.rows, splits),
            *inputs, dquery, dvalue, parts,
            *strides, *dquery.stride()[:3], *dvalue.stride()[:3],
            self.tokens, each, *sizes, WHOLE=whole, **options,
        )  # fmt: skip
        if not whole:
            (splits, each), options = self.layout("landmark_gradient", self.blocks)
            parts = self.empty(self.rows, splits, self.marks, self.padded)
            launch(
                _landmark_gradient,
                (self.rows, splits, self.blocks),
                *inputs,
                parts,
                *strides,
                self.tokens,
                each,
                *sizes,
                **options,
            )
        return parts


def forward(
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    inverse: Tensor,
    local: Tensor | None,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Write the result to `out`; return u and w, (2, B heads, M, P), for `backward`."""
    problem = _Problem(query, landmarks, scale)
    state = problem.empty(2, problem.rows, problem.marks, problem.padded)
    problem.apply(problem.gather(value), inverse, *state)
    problem.scatter(state[1], local, out)
    return state


def backward(
    grad: Tensor,
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    inverse: Tensor,
    state: Tensor,
    scale: float,
    dquery: Tensor,
    dlandmarks: Tensor,
    dvalue: Tensor,
    dinverse: Tensor,
) -> None:
    """Write every gradient."""
    problem = _Problem(query, landmarks, scale)
    u, w = state
    dw, du = problem.empty(2, problem.rows, problem.marks, problem.padded)
    problem.apply(problem.gather(grad), inverse, dw, du, u, dinverse)
    parts = problem.gradients(value, grad, w, du, dquery, dvalue)
    total = parts.sum(1)[..., : problem.width]
    dlandmarks.copy_(total.unflatten(0, (problem.batch, problem.heads)).transpose(1, 2))
