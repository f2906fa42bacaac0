"""The counts of operations: the registered formulas against PyTorch's counter over the references.

The formulas are asked on the meta device, where nothing is launched.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from linsight.kernels import force
from linsight.kernels.agent_attention import agent_attention
from linsight.kernels.depthwise_conv2d import depthwise_conv2d
from linsight.kernels.flow_attention import flow_attention
from linsight.kernels.focused_linear_attention import focused_linear_attention
from linsight.kernels.gaussian_attention import gaussian_attention
from linsight.kernels.hash_attention import hash_attention
from linsight.kernels.landmark_kernel import landmark_kernel
from linsight.kernels.linear_attention import linear_attention
from linsight.kernels.mixed_state_attention import mixed_state_attention
from linsight.kernels.newton_inverse import newton_inverse
from linsight.kernels.polarity_attention import polarity_attention
from linsight.kernels.projected_linear_attention import projected_linear_attention
from linsight.kernels.softmax_attention import attention_of_parts
from linsight.kernels.window_attention import window_attention

Case = tuple[Callable[..., Tensor], list[tuple[int, ...]]]


def cases(side: int, heads: int) -> dict[str, Case]:
    """Each operator with the shapes of its tensors, for a map of `side` x (side + 3)."""
    height, width, channels = side, side + 3, heads * 8
    tokens, packed = height * width, (2, height, width)
    query = (2, tokens, heads, 8)
    weight, vector = (channels, 1, 5, 5), (channels,)
    agents = (2, heads, 6, tokens + 1)
    return {
        "linear_attention": (linear_attention, [query] * 3),
        "norm_aware": (
            lambda *x: linear_attention(*x, feature_map="norm_aware", key_weights="global_query"),
            [query] * 3,
        ),
        "focused_linear_attention": (focused_linear_attention, [*[query] * 3, vector]),
        "polarity_attention": (polarity_attention, [*[query] * 3, *[(heads, 8)] * 2]),
        "flow_attention": (flow_attention, [query] * 3),
        "mixed_state_attention": (
            lambda *x: mixed_state_attention(*x, (height, width)),
            [*[query] * 3, (16, 16)],
        ),
        "projected_linear_attention": (
            lambda *x: projected_linear_attention(*x, heads=heads),
            [(*packed, 4 * channels), weight, vector],
        ),
        "agent_attention": (
            lambda *x: agent_attention(*x, heads=heads, size=(height, width), grid=(2, 3)),
            [(2, tokens + 1, 3 * channels), agents, (channels, 1, 3, 3), vector],
        ),
        "window_attention": (
            lambda *x: window_attention(*x, heads=heads, windows=[(4, 4)], shift=(2, 2)),
            [(*packed, 3 * channels)],
        ),
        "cross_window_attention": (
            lambda x, weight: window_attention(
                x, weight=weight, heads=heads, windows=[(height, 2), (3, width)]
            ),
            [(*packed, 3 * channels), (channels, 1, 3, 3)],
        ),
        "gaussian_attention": (
            gaussian_attention,
            [query, (2, 9, heads, 8), query, (2, heads, 9, 9)],
        ),
        "hash_attention": (
            hash_attention,
            [query, query, (heads, 25, 8), (heads, 25), (heads, 16, 25)],
        ),
        "landmark_kernel": (landmark_kernel, [query]),
        "newton_inverse": (newton_inverse, [(2, heads, side, side)]),
        "newton_inverse_normalized": (
            lambda x: newton_inverse(x, method="normalized", iterations=7),
            [(2, heads, side, side)],
        ),
        "depthwise_conv2d": (depthwise_conv2d, [(*packed, channels), weight]),
        "strided_depthwise_conv2d": (
            lambda *x: depthwise_conv2d(*x, stride=2),
            [(*packed, channels), weight],
        ),
        "activated_depthwise_conv2d": (
            lambda *x: depthwise_conv2d(*x, result_activation="gelu"),
            [(*packed, channels), weight],
        ),
    }


def count(case: Case, choice: str, device: str, gradient: bool) -> int:
    function, shapes = case
    tensors = [torch.rand(shape, device=device, requires_grad=gradient) for shape in shapes]
    with force(choice), FlopCounterMode(display=False) as counter:
        y = function(*tensors)
        if gradient:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("side", "heads"), [(7, 2), (12, 4)])
@pytest.mark.parametrize("name", cases(7, 2))
def test_forward_counts_what_the_reference_does(name: str, side: int, heads: int) -> None:
    case = cases(side, heads)[name]
    expected = count(case, "reference", "cpu", gradient=False)
    assert count(case, "triton", "meta", gradient=False) == expected > 0


# Without a grouped convolution, whose gradient PyTorch counts as if it were not grouped, and
# without the implicit inverse, whose reference multiplies twice more for the sake of its gradient.
@pytest.mark.parametrize(
    "name",
    [
        "linear_attention",
        "norm_aware",
        "focused_linear_attention",
        "polarity_attention",
        "flow_attention",
        "mixed_state_attention",
        "window_attention",
        "gaussian_attention",
        "landmark_kernel",
        "newton_inverse_normalized",
    ],
)
def test_backward_counts_what_the_reference_does(name: str) -> None:
    case = cases(7, 2)[name]
    expected = count(case, "reference", "cpu", gradient=True)
    assert count(case, "triton", "meta", gradient=True) == pytest.approx(expected, rel=0.01)


def test_attention_of_parts_counts_what_pytorchs_fused_attention_does() -> None:
    """On a CPU PyTorch's counter does not see the reference, which calls its fused attention."""

    def attend(query: Tensor, *parts: Tensor) -> Tensor:
        return attention_of_parts(query, parts[:2], [parts[2:4], parts[4:]])

    pairs = ((2, 6, 1, 5), (2, 9, 3, 7), (2, 9, 3, 7))
    shapes = [(*shape[:3], n * shape[3]) for shape in pairs for n in (2, 1)]
    case = attend, [(2, 11, 5 + 2 * 3 * 7), *shapes]
    forward = backward = 0
    for batch, keys, heads, width in pairs:
        query, key = (batch, heads, 11, width), (batch, heads, keys, width)
        forward += sdpa_flop_count(query, key, key)
        backward += sdpa_backward_flop_count(query, query, key, key)
    assert count(case, "triton", "meta", gradient=False) == forward
    assert count(case, "triton", "meta", gradient=True) == forward + backward
