"""Class and register tokens in mixers of maps, against the equations of their docstrings; and
rotary positions, which these tokens have not."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingDinoV3, apply_rot_embed_cat
from torch import nn

from linsight.backbones.context import Context, Place
from linsight.backbones.mixers import MIXERS, build_mixer
from linsight.kernels.newton_inverse import newton_inverse

SIZE, PREFIX, DIM, HEADS = (4, 6), 3, 16, 2


def mixer_and_tokens(name, **options):
    torch.manual_seed(0)
    place = Place(DIM, HEADS, SIZE, prefix_tokens=PREFIX, init_std=0.3)
    mixer = build_mixer(name, place, {name: options}).double().eval()
    x = torch.randn(2, PREFIX + SIZE[0] * SIZE[1], DIM, dtype=torch.float64)
    return mixer, x, Context(SIZE, PREFIX)


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def test_states_of_squares():
    """Token by token: a map's token weighs those of square j by A_ij, and prefix tokens by 1."""
    mixer, x, context = mixer_and_tokens("mhla", squares=2)
    query, key, value = mixer.in_proj(mixer.norm(x)).chunk(3, -1)
    query, key = mixer.query_norm(query).relu() + 1e-6, mixer.key_norm(key).relu() + 1e-6
    query, key, value = map(heads, (query, key, value))
    row, column = torch.meshgrid(*map(torch.arange, SIZE), indexing="ij")
    square = (row // 2 * 2 + column // 3).flatten()
    place = (row % 2 * 3 + column % 3).flatten()
    weights = torch.ones(x.shape[1], x.shape[1], dtype=torch.float64)
    mixing = mixer.attention.mixing.detach()
    weights[PREFIX:, PREFIX:] = mixing[square[:, None], square]
    dense = weights * (query @ key.mT)
    # The authors' normaliser has, of each square, the query at the token's own place.
    norm = dense.sum(-1)
    for i in range(len(square)):
        peers = [((square == j) & (place == place[i])).nonzero().item() for j in range(4)]
        terms = [
            mixing[square[i], j]
            * (query[:, :, PREFIX + peer] * key[:, :, PREFIX:][:, :, square == j].sum(2)).sum(-1)
            for j, peer in enumerate(peers)
        ]
        own = (query[:, :, PREFIX + i] * key[:, :, :PREFIX].sum(2)).sum(-1)
        norm[:, :, PREFIX + i] = sum(terms) + own
    y = (dense @ value / (norm[..., None] + 1e-6)).transpose(1, 2).flatten(2)
    image = value.transpose(1, 2).flatten(2)[:, PREFIX:].unflatten(1, SIZE).permute(0, 3, 1, 2)
    y[:, PREFIX:] += mixer.local(image).flatten(2).mT
    torch.testing.assert_close(mixer(x, context), mixer.out_proj(y))


def test_landmarks():
    """The kernel of all tokens with the map's landmarks, dense."""
    mixer, x, context = mixer_and_tokens("softmax_free", landmark_ratio=2)
    query, value = mixer.in_proj(x).unflatten(-1, (2, HEADS, -1)).unbind(2)
    marks = mixer.landmark(query[:, PREFIX:].unflatten(1, SIZE))
    marks = mixer.landmark_act(mixer.landmark_norm(marks)).transpose(1, 2)
    assert marks.shape[2] == 6

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / 2)

    inverse = newton_inverse(kernel(marks, marks), method="regularized", iterations=20)
    near = kernel(query.transpose(1, 2) * mixer.width**-0.25, marks)
    y = (near @ inverse @ near.mT @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
    image = value.flatten(2)[:, PREFIX:].unflatten(1, SIZE).permute(0, 3, 1, 2)
    filters = mixer.local.weight.repeat_interleave(mixer.width, 0)
    y[:, PREFIX:] += F.conv2d(image, filters, padding=1, groups=DIM).flatten(2).mT
    torch.testing.assert_close(mixer(x, context), mixer.out_proj(y))


def test_a_reduced_map():
    """The keys are the prefix tokens and the reduced map, under one norm."""
    mixer, x, context = mixer_and_tokens("spatial_reduction", reduction=2)
    image = x[:, PREFIX:].unflatten(1, SIZE).permute(0, 3, 1, 2)
    keys = torch.cat((x[:, :PREFIX], mixer.reduce(image).flatten(2).mT), 1)
    assert keys.shape[1] == PREFIX + 6
    key, value = map(heads, mixer.key_value(mixer.norm(keys)).chunk(2, -1))
    query = heads(mixer.query(x))
    weights = (query @ key.mT / (DIM // HEADS) ** 0.5).softmax(-1)
    wanted = mixer.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, context), wanted)
    torch.testing.assert_close(mixer.fuse()(x, context), wanted)


MAPS_ONLY = {"care", "cross_window", "factorized", "large_kernel", "local_window", "window"}


@pytest.mark.parametrize("name", sorted(set(MIXERS) - MAPS_ONLY))
def test_every_token_reaches_every_other(name):
    """A map's last token reads a register, and a register reads that token, at any size."""
    mixer, _, _ = mixer_and_tokens(name)
    x = torch.randn(1, PREFIX + 5 * 9, DIM, dtype=torch.float64, requires_grad=True)
    y = mixer(x, Context((5, 9), PREFIX))
    assert y.shape == x.shape
    for reader, read in ((-1, 1), (1, -1)):
        (gradient,) = torch.autograd.grad(y[0, reader].square().sum(), x, retain_graph=True)
        assert gradient[0, read].abs().max() > 0


class Rotated(nn.Module):
    """A layer whose first results, of so many heads, timm rotates behind the prefix tokens."""

    def __init__(self, layer, count, size=SIZE):
        super().__init__()
        self.layer, self.count = layer, count
        rope = RotaryEmbeddingDinoV3(DIM // HEADS, temperature=100.0, rotate_half=False)
        self.embedding = rope.get_embed(size)

    def forward(self, x):
        y = self.layer(x).unflatten(-1, (-1, DIM // HEADS)).clone()
        tokens = y[:, PREFIX:, : self.count].transpose(1, 2)
        y[:, PREFIX:, : self.count] = apply_rot_embed_cat(tokens, self.embedding).transpose(1, 2)
        return y.flatten(2)


# The layers that give queries and keys, with their numbers of heads.
ROTATED = {name: {"in_proj": 2 * HEADS} for name in set(MIXERS) - MAPS_ONLY} | {
    "ecoformer": {"in_proj": HEADS},
    "mhla": {"query_norm": HEADS, "key_norm": HEADS},
    "softmax_free": {"in_proj": HEADS},
    "spatial_reduction": {"query": HEADS, "key_value": HEADS},
}


@pytest.mark.parametrize("name", sorted(ROTATED))
def test_rotary_positions_rotate_queries_and_keys(name):
    """A mixer of a body with rotary positions is the one of any body, of rotated projections."""
    torch.manual_seed(0)
    rotary, plain = (
        build_mixer(name, Place(DIM, HEADS, SIZE, prefix_tokens=PREFIX, init_std=0.3, rotary=on))
        for on in (True, False)
    )
    plain.load_state_dict(rotary.state_dict())
    for layer, count in ROTATED[name].items():
        size = (2, 3) if layer == "key_value" else SIZE
        setattr(plain, layer, Rotated(getattr(plain, layer), count, size))
    x = torch.randn(2, PREFIX + SIZE[0] * SIZE[1], DIM)
    got = rotary(x, Context(SIZE, PREFIX, rotary_temperature=100.0))
    torch.testing.assert_close(got, plain(x, Context(SIZE, PREFIX)), rtol=1e-4, atol=1e-5)
    # The rotation is no matter of rounding.
    if name != "ecoformer":  # whose codes are all equal until anchors are loaded
        assert (got - rotary(x, Context(SIZE, PREFIX, rotary_temperature=7.0))).abs().max() > 1e-3
