"""Agent attention: a few pooled queries, the agents, stand between the queries and the keys.

Per head, with a the agents (adaptive averages of q over the map), s = D^-0.5 and two biases,

    u = softmax over tokens of (s a k^T + B1) v         the agents aggregate the values
    y = softmax over agents of (s q a^T + B2) u         and broadcast them to the queries
    out = y + conv(v)                                   the local branch, of grid tokens only

so the cost is linear in the number of tokens, at a fixed number of agents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Operator, rows_contiguous, runs_triton, without_autocast
from .depthwise_conv import TRITON_KERNELS
from .linear_attention import WIDEST_TRITON_HEAD


def averages(length: int, cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Adaptive average pooling of `length` places to `cells`, as a matrix (cells, length).

    Cell i averages the places floor(i length / cells) .. ceil((i + 1) length / cells) - 1, which
    overlap where `cells` does not divide `length`.
    """
    i = torch.arange(cells, device=device)[:, None]
    place = torch.arange(length, device=device)
    inside = (place >= i * length // cells) & (place * cells < (i + 1) * length)
    return inside.to(dtype) / inside.sum(1, keepdim=True)


def reference(
    projection: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_bias: Tensor | None,
    heads: int,
    size: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """The equations above as a reader of the paper would write them; see `agent_attention`."""
    dtype = projection.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(projection):
        x = projection.to(wide)
        tokens = x.shape[1]
        prefix = tokens - size[0] * size[1]
        channels = x.shape[2] // 3
        rows, columns = (
            averages(n, cells, wide, x.device) for n, cells in zip(size, grid, strict=True)
        )
        queries = x[:, prefix:, :channels].unflatten(1, size)
        agents = (rows @ (columns @ queries).flatten(2)).unflatten(-1, (grid[1], channels))
        # Rounded as a pooling layer's output is; the products that follow are not.
        agents = agents.to(dtype).to(wide).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        first, second = bias.to(dtype).to(wide)
        scale = q.shape[-1] ** -0.5
        values = (scale * agents @ k.transpose(-1, -2) + first).softmax(-1) @ v
        y = (scale * q @ agents.transpose(-1, -2) + second.transpose(-1, -2)).softmax(-1) @ values
        local = F.conv2d(
            x[:, prefix:, 2 * channels :].unflatten(1, size).permute(0, 3, 1, 2),
            weight.to(wide),
            None if weight_bias is None else weight_bias.to(wide),
            padding=weight.shape[-1] // 2,
            groups=channels,
        )
        local = F.pad(local.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, prefix, 0))
        y = y.transpose(1, 2).flatten(2) + local
    return y.to(dtype)


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
            zero padding k // 2: (C, 1, k, k) with odd k, and (C,) or none. Any of these dtypes.
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
        channels // heads > WIDEST_TRITON_HEAD
        or kernel not in TRITON_KERNELS
        or not runs_triton(projection)
    ):
        return reference(projection, bias, weight, weight_bias, heads, size, grid)
    return _forward(projection, bias, weight, weight_bias, heads, *size, *grid)[0]


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(projection, bias, weight, weight_bias, heads, height, width, rows, columns):
    from . import agent_attention_triton as kernels

    problem = kernels.Problem(
        rows_contiguous(projection), bias, heads, (height, width), (rows, columns)
    )
    out, agents, values, statistics = _run_fake(
        projection, bias, weight, weight_bias, heads, height, width, rows, columns
    )
    kernels.forward(problem, weight.contiguous(), weight_bias, out, agents, values, statistics)
    return out, agents, values, statistics


def _run_fake(projection, bias, weight, weight_bias, heads, height, width, rows, columns):
    batch, tokens, packed = projection.shape
    shape = (batch * heads, rows * columns, packed // (3 * heads))
    return (
        projection.new_empty(batch, tokens, packed // 3),
        projection.new_empty(shape),
        projection.new_empty(shape, dtype=torch.float32),
        projection.new_empty(batch * heads, 2, rows * columns, dtype=torch.float32),
    )


def _run_backward(
    grad, projection, bias, weight, agents, values, statistics, heads, height, width, rows, columns
):
    from . import agent_attention_triton as kernels
    from . import depthwise_conv_triton as convolution

    grad = rows_contiguous(grad)
    problem = kernels.Problem(
        rows_contiguous(projection), bias, heads, (height, width), (rows, columns)
    )
    total = torch.empty(projection.shape, dtype=projection.dtype, device=projection.device)
    dbias = kernels.backward(problem, grad, weight.contiguous(), agents, values, statistics, total)
    prefix, channels = problem.prefix, grad.shape[2]
    size = (height, width)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    dweight_bias = torch.empty(channels, dtype=weight.dtype, device=weight.device)
    convolution.weight_gradient(
        grad[:, prefix:].unflatten(1, size),
        problem.projection[:, prefix:, 2 * channels :].unflatten(1, size),
        1,
        False,
        dweight,
        dweight_bias,
    )
    return total, dbias.to(bias.dtype), dweight, dweight_bias


def _run_backward_fake(
    grad, projection, bias, weight, agents, values, statistics, heads, height, width, rows, columns
):
    return (
        projection.new_empty(projection.shape),
        bias.new_empty(bias.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
    )


def _save(ctx, inputs, output):
    projection, bias, weight, weight_bias, *ctx.sizes = inputs
    _, *state = output
    ctx.save_for_backward(projection, bias, weight, *state)
    ctx.bias_dtype = None if weight_bias is None else weight_bias.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    dprojection, dbias, dweight, dweight_bias = _backward(grad, *ctx.saved_tensors, *ctx.sizes)
    dweight_bias = None if ctx.bias_dtype is None else dweight_bias.to(ctx.bias_dtype)
    return dprojection, dbias, dweight, dweight_bias, None, None, None, None, None


_SIZES = "int heads, SymInt height, SymInt width, int rows, int columns"
_forward = Operator(
    "agent_attention(Tensor projection, Tensor bias, Tensor weight, Tensor? weight_bias, "
    f"{_SIZES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _run_fake,
    _save,
    _differentiate,
)
_backward = Operator(
    "agent_attention_backward(Tensor grad, Tensor projection, Tensor bias, Tensor weight, "
    f"Tensor agents, Tensor values, Tensor statistics, {_SIZES}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _run_backward_fake,
)
