"""Copies of a model, and a model whose constants are folded, give the same outputs."""

import copy
import pickle

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from linsight.kernels import force

from .models import (
    FAMILIES,
    PARTS,
    SIDE,
    create,
    images,
    little,
    not_once,
    of_type,
    quick,
    two_blocks,
)


@pytest.mark.parametrize("name", quick(FAMILIES, PARTS))
def test_folded_constants_keep_the_outputs(name):
    model, x = little(name), images()
    folded = reparameterize_model(model)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PARTS)
def test_each_leaf_module_runs_once_after_folding(name):
    with torch.device("meta"), force("reference"):
        model = reparameterize_model(create(name, **two_blocks(name, 1)).eval())
        assert not_once(model, torch.empty(2, 3, SIDE, SIDE)) == {}


@pytest.mark.parametrize("name", PARTS)
def test_folding_leaves_no_batch_norm_after_a_convolution(name):
    """Only a batch norm that follows no convolution or linear layer directly may be left."""
    before, after = create(name).eval(), reparameterize_model(create(name).eval())
    kinds = nn.modules.batchnorm._BatchNorm
    if of_type(before, kinds):
        assert len(of_type(after, kinds)) < len(of_type(before, kinds))


def assert_copies_agree(model: nn.Module, x: Tensor) -> None:
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        wanted = copy.deepcopy(model)(x)
        for other in copies:
            assert torch.equal(other(x), wanted)


@pytest.mark.parametrize("name", PARTS)
def test_copies_agree(name):
    model, x = little(name, **two_blocks(name)), images()
    with torch.inference_mode():
        model(x)
    assert_copies_agree(model, x)
    model.train()
    model(x).square().sum().backward()
    assert_copies_agree(model, x)
    folded = reparameterize_model(model.eval())
    with torch.inference_mode():
        folded(x)
    assert_copies_agree(folded, x)


@pytest.mark.parametrize("name", PARTS)
def test_folded_constants_are_saved(name):
    model, x = little(name, **two_blocks(name)), images()
    folded = reparameterize_model(model)
    other = reparameterize_model(create(name, **two_blocks(name)).double().eval())
    other.load_state_dict(folded.state_dict())
    with torch.inference_mode():
        assert torch.equal(other(x), folded(x))


@pytest.mark.parametrize("name", PARTS)
def test_a_copy_has_weights_of_its_own(name):
    model, x = little(name, **two_blocks(name)), images()
    with torch.no_grad():
        wanted = model(x)
        for parameter in copy.deepcopy(model).parameters():
            parameter.zero_()
        assert torch.equal(model(x), wanted)
