"""Forward hooks reach each leaf module, once per pass."""

import importlib
import pkgutil

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linsight import kernels
from linsight.backbones import ZOO
from linsight.kernels import force

from .models import FAMILIES, PARTS, SIDE, create, few_blocks, leaves, not_once, quick


class PastItsModules(nn.Module):
    """What models must not do: use the weight of a module without a call, and call one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.act(F.conv2d(x, self.conv.weight, self.conv.bias)))


def test_the_count_of_calls_sees_a_model_that_goes_past_its_modules():
    assert not_once(PastItsModules(), torch.randn(1, 3, 8, 8)) == {"conv": 0, "act": 2}


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_the_count_of_calls_agrees_with_timms_models(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        # timm's fused attention gives the rate of its dropout to PyTorch's operator.
        timms_own = {name: 0 for name in leaves(model) if name.endswith(".attn_drop")}
        assert not_once(model, torch.empty(1, 3, 224, 224)) == timms_own


@pytest.fixture(scope="module", params=quick(list(ZOO), PARTS))
def registered(request):
    """Each model of the zoo with few blocks, and as many channels as it has."""
    name = request.param
    size = {"num_classes": 10, "img_size": SIDE} | few_blocks(name)
    return timm.create_model(name, drop_path_rate=0.1, **size)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_each_leaf_module_runs_once_per_pass(registered, training):
    # PyTorch computes shapes on the meta device in Python, which takes longer than these images.
    with force("reference"):
        assert not_once(registered.train(training), torch.randn(2, 3, SIDE, SIDE)) == {}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", quick(FAMILIES, PARTS))
def test_each_leaf_module_runs_once_where_kernels_run(name, training, monkeypatch):
    """The models take the paths of the Triton kernels, of which none is launched."""
    from triton.runtime.jit import KernelInterface

    # Triton reads the variable where a kernel is defined: those of this process stay as they are.
    for module in pkgutil.walk_packages(kernels.__path__, "linsight.kernels."):
        importlib.import_module(module.name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launches = []
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda *_: lambda *args, **options: launches.append(args)
    )
    model = create(name, drop_path_rate=0.1).train(training)
    with force("triton"):
        assert not_once(model, torch.randn(2, 3, SIDE, SIDE)) == {}
    assert launches
