"""Attention through the Gaussian kernel and landmarks, without a softmax (SOFT)."""

import torch
from torch import Tensor

from .backend import Operator, rows_contiguous, runs_triton, without_autocast
from .landmark_kernel import gaussian_kernel
from .linear_attention import WIDEST_TRITON_HEAD


def reference(
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    inverse: Tensor,
    local: Tensor | None,
    scale: float,
) -> Tensor:
    """The equation as a reader of the paper would write it; see `gaussian_attention`."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(query):
        query = scale * query.to(wide).transpose(1, 2)
        kernel = gaussian_kernel(query, landmarks.transpose(1, 2))
        gathered = kernel.mT @ value.to(wide).transpose(1, 2)
        y = (kernel @ (inverse.to(wide) @ gathered)).transpose(1, 2)
        if local is not None:
            y = y + local.to(wide)
    return y.to(dtype)


def gaussian_attention(
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    inverse: Tensor,
    local: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """K inverse K^T v + local, per head, with K_ij = exp(-|scale q_i - l_j|^2 / 2), N x M.

    The softmax-free attention of SOFT (arXiv:2110.11945, eq. 9), where keys equal queries and
    `inverse` is that of the landmarks' own kernel (`landmark_kernel`, `newton_inverse`). K is
    never stored: its cost in memory is that of q and v.

    Args:
        query, value: (B, N, heads, D), one dtype: float32, float64, float16 or bfloat16. Any
            strides with the last axis contiguous. On CUDA, float64 and heads wider than 128 run
            the reference.
        landmarks: (B, M, heads, D), in the dtype of `query`.
        inverse: (B, heads, M, M), float32 or wider.
        local: (B, N, heads, D), added to the result, or none.
        scale: a factor of the queries alone; SOFT's is D^-1/4.

    Returns:
        (B, N, heads, D) contiguous, in the dtype of `query`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes or dtypes disagree.
    """
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, expected (B, N, heads, D)")
    batch, _, heads, width = query.shape
    marks = landmarks.shape[1]
    for name, x, shape in (
        ("landmarks", landmarks, (batch, marks, heads, width)),
        ("value", value, tuple(query.shape)),
        ("inverse", inverse, (batch, heads, marks, marks)),
        ("local", local, tuple(query.shape)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    for name, x in (("landmarks", landmarks), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype}, but query is {query.dtype}: cast one of them")
    if inverse.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"inverse is {inverse.dtype}, expected float32: a float16 has no room")
    if width > WIDEST_TRITON_HEAD or not runs_triton(query):
        return reference(query, landmarks, value, inverse, local, scale)
    return _forward(query, landmarks, value, inverse, local, scale)[0]


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(query, landmarks, value, inverse, local, scale):
    from . import gaussian_attention_triton as kernels

    query, landmarks, value, local = map(rows_contiguous, (query, landmarks, value, local))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    inverse = inverse.float().contiguous()
    return out, kernels.forward(query, landmarks, value, inverse, local, scale, out)


def _run_fake(query, landmarks, value, inverse, local, scale):
    batch, marks, heads, width = landmarks.shape
    padded = max(16, 1 << (int(width) - 1).bit_length())
    state = query.new_empty(2, batch * heads, marks, padded, dtype=torch.float32)
    return query.new_empty(query.shape), state


def _run_backward(grad, query, landmarks, value, inverse, state, scale):
    from . import gaussian_attention_triton as kernels

    grad, query, landmarks, value = map(rows_contiguous, (grad, query, landmarks, value))
    results = _run_backward_fake(grad, query, landmarks, value, inverse, state, scale)
    inverse = inverse.float().contiguous()
    kernels.backward(grad, query, landmarks, value, inverse, state, scale, *results)
    return results


def _run_backward_fake(grad, query, landmarks, value, inverse, state, scale):
    return (
        *(x.new_empty(x.shape) for x in (query, landmarks, value)),
        inverse.new_empty(inverse.shape),
    )


def _save(ctx, inputs, output):
    *tensors, local, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.local_dtype = None if local is None else local.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    dlocal = None if ctx.local_dtype is None else grad.to(ctx.local_dtype)
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), dlocal, None


_forward = Operator(
    "gaussian_attention(Tensor query, Tensor landmarks, Tensor value, Tensor inverse, "
    "Tensor? local, float scale) -> (Tensor, Tensor)",
    _run,
    _run_fake,
    _save,
    _differentiate,
)
_backward = Operator(
    "gaussian_attention_backward(Tensor grad, Tensor query, Tensor landmarks, Tensor value, "
    "Tensor inverse, Tensor state, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _run_backward_fake,
)
