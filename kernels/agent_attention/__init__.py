"""Agent attention: a few pooled queries, the agents, stand between the queries and the keys.

Per head, with a the agents (adaptive averages of q over the map), s = D^-0.5 and two biases,

    u = softmax over tokens of (s a k^T + B1) v         the agents aggregate the values
    y = softmax over agents of (s q a^T + B2) u         and broadcast them to the queries
    out = y + conv(v)                                   the local branch, of grid tokens only

so the cost is linear in the number of tokens, at a fixed number of agents.
"""

from torch import Tensor

from ..depthwise_conv2d import TRITON_KERNELS
from ..runtime.dispatch import WIDEST_HEAD, runs_triton
from . import operator, reference


def agent_attention(
    projection: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_bias: Tensor | None = None,
    *,
    heads: int,
    size: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """Agent attention of a packed projection, with its local branch (arXiv:2312.08874, eq. 5-7).

    Args:
        projection: (B, P + H * W, 3 C), the channel blocks q, k, v in this order, each of `heads`
            heads of D = C / heads; P >= 0 prefix (class) tokens, then the map in row-major
            order. float32, float64, float16 or bfloat16; any strides with the last axis
            contiguous. On CUDA, float64 and heads wider than 128 run the reference.
        bias: (2, heads, A, P + H * W), any of these dtypes: of the softmax over tokens, B1, and
            of the softmax over agents, B2, transposed. Shared by the batch, and rounded to the
            dtype of `projection`.
        weight, weight_bias: of the local branch, a depthwise convolution of v over the map with
            zero padding k // 2: (C, 1, k, k) with odd k, and (C,) or None. Any of these dtypes.
        heads: number of heads.
        size: (H, W).
        grid: (rows, columns) of agents, A = rows * columns: adaptive averages of q over the
            map (not over the prefix), rounded to the dtype of `projection`.

    Returns:
        (B, P + H * W, C) contiguous, in the dtype of `projection`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes disagree.
    """
    if projection.ndim != 3 or projection.shape[-1] % (3 * heads):
        raise ValueError(
            f"projection has shape {tuple(projection.shape)}, expected (B, N, 3 C) with C a "
            f"multiple of heads = {heads}"
        )
    tokens, channels = projection.shape[1], projection.shape[2] // 3
    if size[0] * size[1] > tokens:
        raise ValueError(f"size is {tuple(size)}, but projection has only {tokens} tokens")
    expected = (2, heads, grid[0] * grid[1], tokens)
    if bias.shape != expected:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {expected}")
    kernel = weight.shape[-1]
    if weight.shape != (channels, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({channels}, 1, k, k) with odd k"
        )
    if (
        channels // heads > WIDEST_HEAD
        or kernel not in TRITON_KERNELS
        or not runs_triton(projection)
    ):
        return reference.agent_attention(projection, bias, weight, weight_bias, heads, size, grid)
    return operator.agent_attention(projection, bias, weight, weight_bias, heads, *size, *grid)[0]
