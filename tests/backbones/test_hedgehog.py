"""Hedgehog's features, and its linear attention as weights of keys."""

import torch

from linsight.backbones.context import Context, Place
from linsight.backbones.mixers import build_mixer


def test_it_is_a_weighted_mean_of_values():
    torch.manual_seed(0)
    place = Place(12, 3, (2, 5), prefix_tokens=1)
    mixer = build_mixer("hedgehog", place).double()
    with torch.no_grad():
        mixer.attention.query_map.add_(torch.randn(3, 4, 4))
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    query, key, value = mixer.in_proj(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    query = torch.einsum("bhnd,hed->bhne", query, mixer.attention.query_map)
    query, key = (torch.softmax(torch.cat((t, -t), -1), -1) for t in (query, key))
    weights = query @ key.mT
    wanted = weights / (weights.sum(-1, keepdim=True) + 1e-6) @ value
    wanted = mixer.out_proj(wanted.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, Context((2, 5), 1)), wanted)


def test_features_begin_as_the_identity():
    mixer = build_mixer("hedgehog", Place(12, 3, (2, 5)))
    assert torch.equal(mixer.attention.key_map, torch.eye(4).repeat(3, 1, 1))
    assert mixer.no_weight_decay() <= dict(mixer.named_parameters()).keys()
