import pytest
import torch
from torch.autograd import gradcheck

from linsight.kernels.mmcv_operators.deformable_attention import (
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)

from .plain import bilinear, differentiable

SHAPES = torch.tensor([[4, 5], [3, 2], [1, 1]])
STARTS = torch.tensor([0, 20, 26])
TOTAL = 27


def problem(batch=2, heads=2, width=3, queries=4, points=2):
    """Values, sampling locations (some outside the map), and attention weights."""
    levels = len(SHAPES)
    return [
        torch.randn(batch, TOTAL, heads, width, dtype=torch.float64),
        torch.rand(batch, queries, heads, levels, points, 2, dtype=torch.float64) * 1.6 - 0.3,
        torch.rand(batch, queries, heads, levels, points, dtype=torch.float64),
    ]


def attention(*tensors):
    def run(value, locations, weights):
        return ms_deform_attn_forward(value, SHAPES, STARTS, locations, weights, im2col_step=64)

    def differentiate(slope, value, locations, weights):
        tensors = (value, locations, weights)
        grads = tuple(torch.full_like(x, torch.nan) for x in tensors)
        ms_deform_attn_backward(
            value, SHAPES, STARTS, locations, weights, slope, *grads, im2col_step=64
        )
        return grads

    return differentiable(run, differentiate)(*tensors)


def plain(value, locations, weights):
    batch, queries, heads, _, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    for level, ((height, width), start) in enumerate(zip(SHAPES.tolist(), STARTS, strict=True)):
        planes = value[:, start : start + height * width].unflatten(1, (height, width))
        sizes = (batch, queries, heads, points)
        for b, q, m, p in torch.cartesian_prod(*map(torch.arange, sizes)).tolist():
            x, y = locations[b, q, m, level, p].tolist()
            sample = bilinear(planes[b, :, :, m], y * height - 0.5, x * width - 0.5)
            out[b, q, m] += weights[b, q, m, level, p] * sample
    return out.flatten(2)


def test_attention(seed):
    tensors = problem()
    torch.testing.assert_close(attention(*tensors), plain(*tensors))


def test_gradient(seed):
    gradcheck(attention, [x.requires_grad_() for x in problem(batch=1, queries=2)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes(seed, dtype):
    tensors = [x.to(dtype) for x in problem()]
    out = attention(*tensors)
    assert out.dtype == dtype
    torch.testing.assert_close(out, plain(*(x.double() for x in tensors)).to(dtype))


def test_no_queries():
    value, locations, weights = problem(queries=0)
    assert attention(value, locations, weights).shape == (2, 0, 6)
