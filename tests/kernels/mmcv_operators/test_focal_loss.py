import math

import pytest
import torch
import torchvision
from torch.autograd import gradcheck

from linsight.kernels.mmcv_operators import focal_loss as operators

from .plain import differentiable

CLASSES = 4
# Every class, background as mmdet writes it (the number of classes), and an ignored row.
TARGET = torch.tensor([0, 3, 1, 2, CLASSES, -1, 3])
NONE = torch.zeros(0)
WEIGHT = torch.tensor([0.5, 2.0, 3.0, 0.25], dtype=torch.float64)
OPTIONS = {"gamma": 1.7, "alpha": 0.3}


def logits(scale: float = 3.0) -> torch.Tensor:
    return torch.randn(len(TARGET), CLASSES, dtype=torch.float64) * scale


def sigmoid_loss(weight, **options):
    def run(x):
        out = torch.full_like(x, torch.nan)
        operators.sigmoid_focal_loss_forward(x, TARGET, weight, out, **options)
        return out

    def differentiate(slope, x):
        grad = torch.full_like(x, torch.nan)
        operators.sigmoid_focal_loss_backward(x, TARGET, weight, grad, **options)
        return grad * slope

    return differentiable(run, differentiate)


def softmax_loss(weight, **options):
    """Of logits: mmcv takes the softmax itself, and gives the operators its result."""

    def run(x):
        out = torch.full(x.shape[:1], torch.nan, dtype=x.dtype)
        operators.softmax_focal_loss_forward(x.softmax(1), TARGET, weight, out, **options)
        return out

    def differentiate(slope, x):
        buff, grad = torch.full_like(slope, torch.nan), torch.full_like(x, torch.nan)
        operators.softmax_focal_loss_backward(x.softmax(1), TARGET, weight, buff, grad, **options)
        return grad * slope[:, None]

    return differentiable(run, differentiate)


def test_sigmoid_against_torchvision(seed):
    x = logits()
    hit = torch.nn.functional.one_hot(TARGET % (CLASSES + 1), CLASSES + 1)[:, :CLASSES]
    expected = torchvision.ops.sigmoid_focal_loss(x, hit.double(), **OPTIONS)
    torch.testing.assert_close(sigmoid_loss(NONE, **OPTIONS)(x), expected)


def test_sigmoid_weights_rows_by_their_class(seed):
    x = logits()
    factors = torch.tensor([0.5, 0.25, 2.0, 3.0, 1.0, 1.0, 0.25]).double()[:, None]
    expected = sigmoid_loss(NONE, **OPTIONS)(x) * factors
    torch.testing.assert_close(sigmoid_loss(WEIGHT, **OPTIONS)(x), expected)


def test_softmax(seed):
    x = logits()
    expected = torch.zeros(len(x), dtype=torch.float64)
    for i, label in enumerate(TARGET.tolist()):
        if 0 <= label < CLASSES:
            p = math.exp(x[i, label]) / sum(math.exp(v) for v in x[i])
            loss = -OPTIONS["alpha"] * (1 - p) ** OPTIONS["gamma"] * math.log(p)
            expected[i] = loss * WEIGHT[label]
    torch.testing.assert_close(softmax_loss(WEIGHT, **OPTIONS)(x), expected)


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
@pytest.mark.parametrize("weight", [NONE, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient(seed, loss, weight, gamma):
    gradcheck(loss(weight, gamma=gamma, alpha=0.25), logits().requires_grad_())


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(loss, gamma, dtype):
    x = torch.tensor([-200.0, 200.0, 0.0, 60.0]).repeat(len(TARGET), 1).to(dtype).requires_grad_()
    out = loss(NONE.to(dtype), gamma=gamma, alpha=0.25)(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.dtype == grad.dtype == dtype
    assert out.isfinite().all()
    assert grad.isfinite().all()


def test_a_wrong_certainty_costs_its_logit():
    """mmcv's kernel stops at 87.3, the logarithm of the smallest float32."""
    x = torch.tensor([[-150.0]])
    out = torch.empty_like(x)
    operators.sigmoid_focal_loss_forward(x, torch.tensor([0]), NONE, out, 2.0, 0.25)
    assert out.item() == pytest.approx(0.25 * 150)


def test_no_rows():
    x = torch.zeros(0, CLASSES)
    target = torch.zeros(0, dtype=torch.long)
    operators.sigmoid_focal_loss_forward(x, target, NONE, x, 2.0, 0.25)
    operators.sigmoid_focal_loss_backward(x, target, NONE, x, 2.0, 0.25)
    operators.softmax_focal_loss_forward(x, target, NONE, torch.zeros(0), 2.0, 0.25)
    operators.softmax_focal_loss_backward(x, target, NONE, torch.zeros(0), x, 2.0, 0.25)
