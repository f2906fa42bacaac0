"""FaViT's shares of the channels, folded."""

import pytest
import torch
from torch import nn

from linsight.backbones.mixers.factorized import LocalShare


@pytest.fixture
def share() -> LocalShare:
    torch.manual_seed(0)
    return LocalShare(12, 2, 3).double().eval()


@torch.no_grad()
def test_a_folded_share_has_one_projection(share: LocalShare) -> None:
    tokens = torch.randn(2, 9, 2, 6).double()
    wanted = share(tokens)
    share.fuse()
    assert isinstance(share.fc, nn.Identity)
    for got, expected in zip(share(tokens), wanted, strict=True):
        torch.testing.assert_close(got, expected)
    again = [parameter.clone() for parameter in share.parameters()]
    share.fuse()
    torch.testing.assert_close(list(share.parameters()), again)


@pytest.mark.parametrize("name", ["fc", "key_value"])
def test_a_layer_of_another_class_is_not_folded(share: LocalShare, name: str) -> None:
    layer = nn.Sequential(getattr(share, name))
    setattr(share, name, layer)
    before = {key: value.clone() for key, value in share.state_dict().items()}
    share.fuse()
    assert getattr(share, name) is layer
    torch.testing.assert_close(share.state_dict(), before)


def test_a_layer_without_a_bias_is_not_folded(share: LocalShare) -> None:
    share.fc.bias = None
    share.fuse()
    assert isinstance(share.fc, nn.Linear)
