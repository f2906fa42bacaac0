"""The fused moving average is mmengine's."""

import pytest
import timm
import torch
from mmengine.model import ExponentialMovingAverage

import linsight  # noqa: F401  registers the models
from linsight.heads.averaging import FusedExponentialMovingAverage


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("interval", [1, 2])
def test_it_is_that_of_mmengine(update_buffers, interval):
    model = timm.create_model("rala_vit_nano")
    options = {"momentum": 0.0002, "interval": interval, "update_buffers": update_buffers}
    theirs = ExponentialMovingAverage(model, **options)
    ours = FusedExponentialMovingAverage(model, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += 0.1 * torch.randn(value.shape, generator=generator)
            else:
                value += 1
        theirs.update_parameters(model)
        ours.update_parameters(model)
    wanted, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=0, msg=name)
    weight = model.state_dict()["head.fc.weight"]
    assert not torch.equal(found["module.head.fc.weight"], weight)
