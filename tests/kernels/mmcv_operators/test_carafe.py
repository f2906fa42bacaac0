import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from linsight.kernels.mmcv_operators import carafe

from .plain import differentiable


def upsampling(naive: bool):
    options = {"kernel_size": 3, "group_size": 2, "scale_factor": 2}

    def run(features, masks):
        kept, out = torch.empty_like(features), torch.full((2, 4, 8, 6), torch.nan).to(features)
        if naive:
            carafe.carafe_naive_forward(features, masks, out, **options)
        else:
            carafe.carafe_forward(features, masks, kept, None, None, out, **options)
            assert torch.equal(kept, features)
        return out

    def differentiate(slope, features, masks):
        grads = torch.full_like(features, torch.nan), torch.full_like(masks, torch.nan)
        if naive:
            carafe.carafe_naive_backward(slope, features, masks, *grads, **options)
        else:
            scratch = [None] * 4
            carafe.carafe_backward(slope, features, masks, *scratch, *grads, **options)
        return grads

    return differentiable(run, differentiate)


@pytest.mark.parametrize("naive", [True, False])
def test_carafe(seed, naive):
    features = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    masks = torch.randn(2, 2 * 9, 8, 6, dtype=torch.float64)
    patches = F.unfold(features, 3, padding=1).view(2, 2, 2, 9, 4, 3)
    patches = patches.repeat_interleave(2, 4).repeat_interleave(2, 5)
    expected = (patches * masks.view(2, 2, 1, 9, 8, 6)).sum(3).view(2, 4, 8, 6)
    torch.testing.assert_close(upsampling(naive)(features, masks), expected)


@pytest.mark.parametrize("naive", [True, False])
def test_gradient_of_carafe(seed, naive):
    features = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    masks = torch.randn(2, 2 * 9, 8, 6, dtype=torch.float64)
    gradcheck(upsampling(naive), (features.requires_grad_(), masks.requires_grad_()))
