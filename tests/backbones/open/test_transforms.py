"""Memory formats, functional transforms, tracers and batches of no images, as of any timm model."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.feature_extraction import create_feature_extractor

from linsight.kernels import force

from .models import FAMILIES, PARTS, create, distance, images, little, one_image, two_blocks


@pytest.mark.parametrize("name", FAMILIES)
def test_no_parameter_is_of_rank_5(name):
    """`Module.to(memory_format=torch.channels_last)`, which timm's scripts call, takes none."""
    with torch.device("meta"):
        model = create(name, **two_blocks(name))
    assert [key for key, value in model.state_dict().items() if value.ndim > 4] == []


@pytest.mark.parametrize("name", PARTS)
def test_channels_last_changes_no_output(name):
    model, x = little(name, **two_blocks(name)), one_image()
    wanted = model(x)
    model.to(memory_format=torch.channels_last)
    got = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted)
    got.sum().backward()


def loss_of(model: nn.Module):
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(model, (parameters, buffers), (x[None],))
        return out.square().sum()

    return {name: p.detach() for name, p in model.named_parameters()}, loss


@pytest.mark.parametrize("name", PARTS)
def test_gradients_of_each_image(name):
    """As differentially private training takes them, where kernels would run as well."""
    model, x = little(name, **two_blocks(name)), images()
    parameters, loss = loss_of(model)
    with force("triton"):
        per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
        gradients = per_image(parameters, x)
    model(x[1:]).square().sum().backward()
    wanted = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    got = {key: gradients[key][1] for key in wanted}
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_a_directional_derivative():
    model, x = little("rala_vit_nano"), one_image()
    step = torch.randn_like(x)
    # PyTorch's fused attention on a CPU has no forward derivative.
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(model, (x,), (step,))
    difference = (model(x + 1e-6 * step) - model(x - 1e-6 * step)) / 2e-6
    assert distance(slope, difference) < 1e-5


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_fx_traces_for_any_size(name):
    model, x = little(name, **two_blocks(name)), one_image()
    traced = torch.fx.symbolic_trace(model)
    for batch in (x, torch.cat((x, x), -1)):
        torch.testing.assert_close(traced(batch), model(batch))


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_fx_traces_feature_maps_for_any_size(name):
    """`features_only` is `forward_intermediates` as a module."""
    model = little(name, features_only=True, out_indices=1, **two_blocks(name))
    wide = torch.cat((one_image(), one_image()), -1)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(wide), model(wide))


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_torchvision_extracts_features(name):
    model, x = little(name, **two_blocks(name)), one_image()
    seen = []
    mixer = next(part for part in model.modules() if hasattr(part, "convert_checkpoint"))
    node = next(key for key, part in model.named_modules() if part is mixer)
    mixer.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    extractor = create_feature_extractor(model, [node])
    torch.testing.assert_close(extractor(x)[node], seen[0])


@pytest.mark.parametrize("name", PARTS)
def test_no_images(name):
    model = create(name, **two_blocks(name)).eval()
    assert model(torch.randn(0, 3, 64, 64)).shape == (0, 10)
    logits = model.train()(torch.randn(0, 3, 64, 64))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
