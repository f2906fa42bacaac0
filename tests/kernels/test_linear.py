"""Linear layers and softmax attention by oneDNN, against PyTorch's own functions."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from linsight.kernels import force, linear, softmax_attention

needs_onednn = pytest.mark.skipif(not linear._HAS_ONEDNN, reason="an x86 CPU with oneDNN")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_this_pytorch_has_the_operator():
    assert linear._PRODUCT is not None, f"adapt kernels/linear to torch {torch.__version__}"


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the inputs that oneDNN got."""
    found = []

    def note(x, *args):
        found.append(tuple(x.shape))
        return product(x, *args)

    product = linear._PRODUCT
    monkeypatch.setattr(linear, "_PRODUCT", note)
    return found


def tensors():
    torch.manual_seed(0)
    return torch.randn(2, 7, 24), torch.randn(40, 24), torch.randn(40)


INPUTS = {
    "tokens": torch.randn(2, 7, 24),
    "map": torch.randn(2, 3, 5, 24),
    "vector": torch.randn(24),
    "no images": torch.randn(0, 7, 24),
    "no tokens": torch.randn(2, 0, 24),
    "channels of more": torch.randn(2, 7, 48)[..., 12:36],
    "transposed": torch.randn(2, 24, 7).transpose(1, 2),
    "expanded": torch.randn(1, 7, 24).expand(3, 7, 24),
}


@needs_onednn
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_onednn_computes_what_pytorch_does(x, biased, calls):
    _, weight, bias = tensors()
    bias = bias if biased else None
    got, wanted = linear.linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("part", "change"),
    [
        (1, lambda w: torch.cat((w, w), 1)[:, ::2]),
        (1, lambda w: w.t().contiguous().t()),
        (2, lambda b: torch.stack((b, 2 * b), 1)[:, 0]),
    ],
    ids=["every other column", "transposed weight", "every other bias"],
)
@torch.no_grad()
def test_weights_of_other_strides_are_pytorchs(part, change, calls):
    arguments = list(tensors())
    arguments[part] = change(arguments[part])
    assert not arguments[part].is_contiguous()
    assert torch.equal(linear.linear(*arguments), F.linear(*arguments))
    assert calls == []


class Quantized(torch.Tensor):
    """A class of tensors of one's own."""


def test_what_else_sees_a_call_is_pytorchs(calls, monkeypatch):
    x, weight, bias = tensors()
    assert linear.linear(x.requires_grad_(), weight, bias).requires_grad
    x = x.detach()
    with torch.no_grad():
        for change in (torch.Tensor.double, torch.Tensor.bfloat16):
            assert linear.linear(change(x), change(weight), None).dtype == change(x).dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert linear.linear(x, weight, bias).dtype == torch.bfloat16
        with force("reference"):
            linear.linear(x, weight, bias)
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.mkldnn, "enabled", False)
            linear.linear(x, weight, bias)
        kept = weight.as_subclass(Quantized)
        assert isinstance(linear.linear(x, kept, bias), Quantized)
        with torch.device("meta"):
            assert linear.linear(torch.empty(2, 24), torch.empty(40, 24)).shape == (2, 40)
        each = torch.func.vmap(linear.linear, (0, None, None))(x, weight, bias)
        torch.testing.assert_close(each, F.linear(x, weight, bias))
        with forward_ad.dual_level():
            for place in range(3):
                duals = [x, weight, bias]
                duals[place] = forward_ad.make_dual(duals[place], torch.ones_like(duals[place]))
                assert forward_ad.unpack_dual(linear.linear(*duals)).tangent is not None
        traced = torch.jit.trace(linear.linear, (x, weight, bias), check_trace=False)
        assert "mkldnn" not in str(traced.graph)
        with FlopCounterMode(display=False) as counter:
            linear.linear(x, weight, bias)
        assert counter.get_total_flops() == 2 * 14 * 24 * 40
    assert calls == []


def attention_tensors(keys, heads=3, width=16, values=16, batch=2, queries=None):
    torch.manual_seed(0)
    queries = keys if queries is None else queries
    shapes = (queries, width), (keys, width), (keys, values)
    # As heads lie in a packed projection: tokens before heads.
    return [torch.randn(batch, n, heads, d).transpose(1, 2) for n, d in shapes]


@needs_onednn
@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (512, {}),
        (600, {"values": 24}),
        (700, {"queries": 5}),
        (700, {"queries": 0}),
        (640, {"batch": 0}),
    ],
)
@torch.no_grad()
def test_attention_by_products(keys, options, calls, monkeypatch):
    monkeypatch.setattr(softmax_attention, "MOST_THREADS", torch.get_num_threads())
    query, key, value = attention_tensors(keys, **options)
    got = softmax_attention.softmax_attention(query, key, value)
    wanted = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * 3 * query.shape[0] * max(1, -(-query.shape[2] // 256))


@needs_onednn
@torch.no_grad()
def test_a_piece_of_an_attention_map_is_small(calls, monkeypatch):
    monkeypatch.setattr(softmax_attention, "MOST_THREADS", torch.get_num_threads())
    tensors = attention_tensors(20000, heads=1, batch=1, queries=100)
    softmax_attention.softmax_attention(*tensors)
    assert max(rows * 20000 for rows, _ in calls) <= softmax_attention.PIECE


@torch.no_grad()
def test_large_scores_stay_finite():
    query, key, value = attention_tensors(512)
    got = softmax_attention.softmax_attention(1e4 * query, 1e4 * key, value)
    wanted = F.scaled_dot_product_attention(1e4 * query, 1e4 * key, value)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_attention_elsewhere_is_pytorchs(calls, monkeypatch):
    query, key, value = attention_tensors(512)
    with torch.no_grad():
        softmax_attention.softmax_attention(query, key[:, :, 1:], value[:, :, 1:])
        shared = softmax_attention.softmax_attention(query, key[:1], value[:1])
        assert shared.shape == query.shape
        monkeypatch.setattr(softmax_attention, "MOST_THREADS", torch.get_num_threads() - 1)
        softmax_attention.softmax_attention(query, key, value)
    monkeypatch.undo()
    assert softmax_attention.softmax_attention(query.requires_grad_(), key, value).requires_grad
    assert calls == []
