"""The Triton kernels of `gaussian_attention`: their order, their tiles, their launches.

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
from torch import Tensor

from .gaussian_attention_backward_triton import _landmark_gradient, _token_gradient
from .gaussian_attention_forward_triton import _apply, _gather, _scatter
from .landmark_kernel_triton import padded_size
from .triton_launch import Tile, launch, multiprocessors, split_tokens

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
                _landmark_gradient, (self.rows, splits, self.blocks),
                *inputs, parts, *strides, self.tokens, each, *sizes, **options,
            )  # fmt: skip
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
