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


@pytest.mark.parametrize("batch", [64, 1024])
def test_an_average_reaches_as_many_images_at_any_batch(batch):
    from types import SimpleNamespace

    from linsight.heads.averaging import BatchScaledEMAHook

    hook = BatchScaledEMAHook(decay=0.99, base_batch_size=512)
    model = torch.nn.Linear(1, 1)
    loader = SimpleNamespace(batch_size=batch)
    hook.before_run(SimpleNamespace(model=model, train_dataloader=loader, _train_loop=object()))
    iterations = 512 * 100 // batch
    hook.ema_model.update_parameters(model)
    torch.nn.init.constant_(model.weight, 1.0)
    torch.nn.init.constant_(hook.ema_model.module.weight, 0.0)
    for _ in range(iterations):
        hook.ema_model.update_parameters(model)
    assert hook.ema_model.module.weight.item() == pytest.approx(1 - 0.99**100, rel=1e-3)


def test_a_decay_beyond_its_range_is_refused():
    from linsight.heads.averaging import BatchScaledEMAHook

    with pytest.raises(ValueError, match=r"decay is 1\.5, expected a number between 0 and 1"):
        BatchScaledEMAHook(decay=1.5, base_batch_size=512)
