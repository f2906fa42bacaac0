"""Without a GPU: the kernels compile for one, through the very launches that would run them.

The interpreter takes Python that Triton's compiler does not; this finds the difference.
"""

import pytest
import torch

# Importing an operator registers it in `torch.ops`.
from linsight.kernels import (
    agent_attention,  # noqa: F401
    batch_norm,
    column_sum,
    conv2d,
    flow_attention,  # noqa: F401
    focused_linear_attention,  # noqa: F401
    gaussian_attention,  # noqa: F401
    hash_attention,  # noqa: F401
    layer_norm,
    mixed_state_attention,  # noqa: F401
    newton_inverse,  # noqa: F401
    polarity_attention,  # noqa: F401
    projected_softmax_attention,
    rotary,
    scaled_add,
    softmax_attention,  # noqa: F401
    window_attention,  # noqa: F401
    window_pool,  # noqa: F401
)
from linsight.kernels.rotary import rotary_tables
from linsight.kernels.runtime.dispatch import HAS_TRITON

from .conftest import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="the other tests compile and run them"),
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
]


@pytest.fixture
def kernel_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels compiled for an H100 where they would be launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """The driver of a GPU that is not there."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    names = []

    def launch(kernel: JITFunction, grid: tuple) -> object:
        def run(*args, **kwargs) -> None:
            code = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            assert code.asm["cubin"]
            assert code.metadata.shared <= 227 * 1024, "more shared memory than an H100 has"
            names.append(kernel.__name__)

        return run

    monkeypatch.setattr(JITFunction, "__getitem__", launch, raising=False)
    monkeypatch.setattr(driver, "_active", Absent())
    return names


@pytest.mark.parametrize(
    ("width", "dtype", "mechanism"),
    [
        (64, torch.bfloat16, ("elu_plus_one", "global_query", "normalized")),
        pytest.param(
            *(64, torch.float16, ("elu_plus_one", "global_query", "subtractive")),
            marks=pytest.mark.slow,
        ),
        (96, torch.float16, ("elu_plus_one", "uniform", "magnitude_aware")),
    ],
)
def test_gated_mixer(width: int, dtype: torch.dtype, mechanism: tuple, kernel_names: list) -> None:
    projection = torch.zeros(2, 14, 13, 4 * width, dtype=dtype, requires_grad=True)
    weight = torch.zeros(width, 1, 5, 5, requires_grad=True)
    rows, columns = rotary_tables((14, 13), width, dtype, projection.device)
    y, *_ = torch.ops.linsight.projected_linear_attention(
        projection, weight, None, rows, columns, 1, *mechanism
    )
    y.backward(y.detach())
    assert {"_state", "_read", "_key_gradient", "_query_gradient", "_weigh"} < set(kernel_names)


def test_gated_softmax(kernel_names: list, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = projected_softmax_attention
    monkeypatch.setattr(operator, "runs_triton", lambda x: True)
    projection = torch.zeros(2, 14, 13, 4 * 96, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(96, 1, 5, 5, requires_grad=True)
    rotary = rotary_tables((14, 13), 48, projection.dtype, projection.device)
    y = operator.projected_softmax_attention(projection, weight, heads=2, rotary=rotary)
    y.backward(y.detach())
    assert {"_convolve", "_weigh", "_turn", "_finish", "_finish_gradient"} < set(kernel_names)


def test_norm_aware_attention(kernel_names: list) -> None:
    query = torch.zeros(2, 14 * 13, 2, 32, dtype=torch.bfloat16, requires_grad=True)
    tables = rotary_tables((14, 13), 32, query.dtype, query.device)
    y, _ = torch.ops.linsight.linear_attention(
        query, query, query, *tables, None, None, "norm_aware", "uniform", "normalized"
    )
    y.backward(y.detach())
    wanted = {"_state", "merge", "_read", "_key_gradient", "_query_gradient"}
    assert wanted < set(kernel_names)


def test_focused_attention(kernel_names: list) -> None:
    projection = torch.zeros(2, 14 * 13, 3, 3, 16, dtype=torch.float16, requires_grad=True)
    scale = torch.zeros(48, requires_grad=True)
    y, _ = torch.ops.linsight.focused_linear_attention(*projection.unbind(2), scale, None, 3)
    y.backward(y.detach())
    assert {"_forward", "_backward", "_scale_gradient", "_state", "_key_gradient"} < set(
        kernel_names
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_polarity_attention(dtype: torch.dtype, kernel_names: list) -> None:
    projection = torch.zeros(2, 14 * 13, 4, 2, 32, dtype=dtype, requires_grad=True)
    power, scale = torch.ones(2, 2, 32, requires_grad=True).unbind()
    query, key, value, gate = projection.unbind(2)
    y, _ = torch.ops.linsight.polarity_attention(query, key, value, power, scale, value, gate)
    y.backward(y.detach())
    wanted = {"_state", "merge", "_read", "_output_gradient", "_key_gradient", "_query_gradient"}
    assert wanted < set(kernel_names)
    assert kernel_names[-1] == "_parameter_gradients"


@pytest.mark.parametrize(("heads", "width"), [(12, 8), (2, 64)])
def test_flow_attention(heads: int, width: int, kernel_names: list) -> None:
    dtype = torch.bfloat16
    projection = torch.zeros(2, 14 * 13, 3, heads, width, dtype=dtype, requires_grad=True)
    y, _ = torch.ops.linsight.flow_attention(*projection.unbind(2))
    y.backward(y.detach())
    forward = ["_token_sums", "_flow_sums", "_state", "merge", "_read"]
    backward = ["_value_gradient", "_query_gradient", "_key_gradient"]
    assert kernel_names == [*forward, "_output_gradient", "merge", *backward]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hash_attention(dtype: torch.dtype, kernel_names: list) -> None:
    query = torch.zeros(2, 14 * 13, 2, 32, dtype=dtype, requires_grad=True)
    constants = torch.zeros(2, 25, 32), torch.zeros(2, 25), torch.zeros(2, 16, 25)
    y, *_ = torch.ops.linsight.hash_attention(query, query, *constants)
    y.backward(y.detach())
    wanted = {"_directions", "_codes", "_read", "_state_gradient", "_token_gradient"}
    assert wanted <= set(kernel_names)


@pytest.mark.parametrize(
    ("squares", "width", "dtype"),
    [(4, 64, torch.bfloat16), (2, 96, torch.float16), (7, 32, torch.float32)],
)
@pytest.mark.parametrize("by_states", [False, True])
def test_mixed_state_attention(by_states, squares, width, dtype, kernel_names: list) -> None:
    projection = torch.zeros(2, 14 * 13, 3, 2, width, dtype=dtype, requires_grad=True)
    mixing = torch.zeros(squares**2, squares**2, requires_grad=True)
    y, *_ = torch.ops.linsight.mixed_state_attention(
        *projection.unbind(2), mixing, projection[:, :, 0], 14, 13, by_states
    )
    y.backward(y.detach())
    of_pairs = {"_sum_keys", "_attend", "_query_gradient", "_key_gradient"}
    of_states = {"_sum_states", "_mix_states", "_normalise", "_read"}
    of_states |= {"_differentiate_read", "_mix_slopes", "_differentiate_states"}
    assert set(kernel_names) == (of_states if by_states else of_pairs)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_batch_norm(activation: str, kernel_names: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "runs_triton", lambda x: True)
    x = torch.zeros(2, 24, 7, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    vectors = [torch.zeros(24) for _ in range(4)]
    with torch.no_grad():
        batch_norm.batch_norm(x, *vectors, training=False, activation=activation)
    for t in (x, *vectors[:2]):
        t.requires_grad_()
    y = batch_norm.batch_norm(x, *vectors, activation=activation)
    y.backward(y.detach())
    forward, backward = ["_gather", "_merge", "_normalize"], ["_gradient_sums", "_input_gradient"]
    assert kernel_names == ["_normalize_running", *forward, *backward]


def test_batch_norm_of_a_group(kernel_names: list) -> None:
    from linsight.kernels.batch_norm.forward import reduce

    reduce(torch.zeros(9, 3, 24))
    assert kernel_names == ["_reduce"]


@pytest.mark.parametrize(("outputs", "kernel"), [(32, 3), (96, 4), (64, 7)])
def test_image_convolution(outputs, kernel, kernel_names: list, monkeypatch) -> None:
    monkeypatch.setattr(conv2d, "runs_triton", lambda x: True)
    weight, bias = torch.zeros(outputs, 3, kernel, kernel), torch.zeros(outputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d.conv2d(torch.zeros(2, 3, 28, 24), weight.requires_grad_(), bias, stride=2)
    y.backward(y.detach())
    assert kernel_names == ["_convolve_image", "_image_weight_gradient"]


def test_convolution_with_bias(kernel_names: list, monkeypatch) -> None:
    monkeypatch.setattr(conv2d, "runs_triton", lambda x: True)
    weight, bias = (torch.zeros(s, requires_grad=True) for s in ((70, 12, 3, 3), (70,)))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d.conv2d(torch.zeros(2, 12, 7, 5), weight, bias)
    y.backward(y.detach())
    assert kernel_names == ["_finish", "_sum_columns", "_sum_columns"]


def test_scaled_add(kernel_names: list) -> None:
    x = torch.zeros(2, 14, 320, dtype=torch.bfloat16, requires_grad=True)
    scale, keep = torch.zeros(320, requires_grad=True), torch.ones(2, 1, 1)
    for factors in ((scale, None), (scale, keep), (None, keep)):
        kernel_names.clear()
        scaled_add.operator.scaled_add(x, x, *factors).backward(x.detach())
        assert kernel_names == ["_forward", "_backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [96, 10])
def test_column_sum(channels: int, dtype: torch.dtype, kernel_names: list) -> None:
    column_sum.operator.run_sum(torch.zeros(1000, channels, dtype=dtype), dtype)
    assert kernel_names == ["_sum_columns", "_sum_columns"]


def test_rotary(kernel_names: list) -> None:
    x = torch.zeros(2, 14 * 13, 2, 48, dtype=torch.bfloat16, requires_grad=True)
    y = rotary.operator.turn(x, *rotary_tables((14, 13), 48, x.dtype, x.device), False)
    y.backward(y.detach())
    assert kernel_names == ["_turn", "_turn"]


@pytest.mark.parametrize("channels", [64, 320])
def test_layer_norm(channels: int, kernel_names: list) -> None:
    x = torch.zeros(2, 14, channels, dtype=torch.bfloat16, requires_grad=True)
    vector = torch.zeros(channels, requires_grad=True)
    keep = torch.ones(2, 1, 1)
    for factors in ((None, None), (vector, None), (None, keep), (vector, keep)):
        kernel_names.clear()
        total, norm = layer_norm.operator.add_layer_norm(x, x, *factors, vector, vector, 1e-6)
        (total + norm).backward(x.detach())
        assert kernel_names == ["_forward", "_backward"]
    layer_norm.operator.layer_norm(x, vector, vector, 1e-6).backward(x.detach())
    layer_norm.operator.rms_norm(x, vector, 1e-6).backward(x.detach())
    assert kernel_names == ["_forward", "_backward"] * 3


@pytest.mark.parametrize("activation", ["gelu", "relu", None])
@pytest.mark.parametrize(("stride", "window"), [(1, (3, 3)), (2, (3, 3)), (1, (11, 1))])
def test_depthwise_convolution(stride, window, activation, kernel_names: list) -> None:
    x = torch.zeros(2, 14, 13, 48, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(48, 1, *window, requires_grad=True)
    arguments = (weight, weight[:, 0, 0, 0], stride, 1, activation, stride == 1, x.dtype)
    y = torch.ops.linsight.depthwise_conv2d(x, *arguments)
    y.backward(y.detach())
    assert len(kernel_names) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deformable_attention(dtype: torch.dtype, kernel_names: list) -> None:
    from linsight.kernels.mmcv_operators import deformable_attention  # noqa: F401

    shapes, starts = torch.tensor([[7, 5], [3, 4]]), torch.tensor([0, 35])
    value = torch.zeros(2, 47, 8, 32, dtype=dtype)
    locations, weights = torch.zeros(2, 9, 8, 2, 4, 2).to(dtype), torch.zeros(2, 9, 8, 2, 4)
    tensors = (value, shapes, starts, locations, weights.to(dtype))
    out = torch.ops.linsight.deformable_attention(*tensors)
    torch.ops.linsight.deformable_attention_backward(out, *tensors)
    assert set(kernel_names) == {"_attend", "_differentiate", "_round"}


@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(weighted: bool, kernel_names: list) -> None:
    from linsight.kernels.mmcv_operators import focal_loss  # noqa: F401

    x, target = torch.zeros(9, 80), torch.zeros(9, dtype=torch.long)
    weight = torch.zeros(80 if weighted else 0)
    for gradient in (False, True):
        torch.ops.linsight.sigmoid_focal_loss(x, target, weight, x, 2.0, 0.25, gradient)
    assert set(kernel_names) == {"_focal"}


@pytest.mark.parametrize(("marks", "dtype"), [(49, torch.bfloat16), (81, torch.float16)])
def test_gaussian_attention(marks: int, dtype: torch.dtype, kernel_names: list) -> None:
    query = torch.zeros(2, 196, 2, 32, dtype=dtype, requires_grad=True)
    landmarks = torch.zeros(2, marks, 2, 32, dtype=dtype)
    y, _ = torch.ops.linsight.gaussian_attention(
        query, landmarks, query, torch.zeros(2, 2, marks, marks), query, 0.4
    )
    y.backward(y.detach())
    kernel = torch.ops.linsight.landmark_kernel(landmarks.requires_grad_())
    kernel.backward(kernel.detach())
    assert {"_gather", "_apply", "_scatter", "_token_gradient"} <= set(kernel_names)
    assert {"_landmark_kernel", "_landmark_kernel_gradient"} <= set(kernel_names)
    assert ("_landmark_gradient" in kernel_names) == (marks > 64)


@pytest.mark.parametrize(
    ("width", "shares", "dtype"),
    [(28, 2, torch.bfloat16), (56, 1, torch.float16), (84, 1, torch.float32)],
)
def test_attention_of_parts(width: int, shares: int, dtype: torch.dtype, kernel_names) -> None:
    query = torch.zeros(2, 196, 16 + shares * 2 * width, dtype=dtype, requires_grad=True)
    whole = [torch.zeros(2, 49, 1, 16 * n, dtype=dtype, requires_grad=True) for n in (2, 1)]
    parts = [torch.zeros(2, 49, 2, n * width, dtype=dtype) for n in (2, 1)] * shares
    parts += [None] * (4 - len(parts))
    y = torch.ops.linsight.attention_of_parts(query, *whole, *parts)
    y.backward(y.detach())
    assert kernel_names == ["_attend"] * 2 + ["_gradient", "_finish"] * 2


@pytest.mark.parametrize(("size", "depth"), [((28, 30), 28), ((7, 7), 56), ((2, 3), 7)])
def test_window_pool(size: tuple[int, int], depth: int, kernel_names: list) -> None:
    x = torch.zeros(2, *size, 4 * depth, dtype=torch.bfloat16, requires_grad=True)
    y = torch.ops.linsight.window_pool(x, 2, 7, [1, 4])
    y.backward(y.detach())
    assert kernel_names == ["_pool"] * 2 + ["_spread"] * 2


def test_newton_inverse(kernel_names: list) -> None:
    x = torch.zeros(2, 49, 49, requires_grad=True)
    alpha = torch.zeros(2)
    for operator in (torch.ops.linsight.newton_implicit, torch.ops.linsight.newton_unrolled):
        y = operator(x, alpha, 0.01, 1)
        y.backward(y.detach())
    torch.ops.linsight.newton_residuals(x.detach(), alpha)
    expected = {"_iterate", "_implicit_gradient", "_unrolled_gradient", "_residuals"}
    assert set(kernel_names) == expected


@pytest.mark.parametrize(
    ("windows", "shift", "width", "local", "dtype"),
    [
        ([7, 7], [3, 3], 32, False, torch.bfloat16),  # Swin
        ([12, 12], [6, 6], 32, False, torch.bfloat16),  # at 384 px
        ([16, 1, 1, 15], [0, 0], 24, True, torch.float16),  # CSwin
        ([16, 7, 9, 15], [0, 0], 32, True, torch.bfloat16),  # streamed, and not
        ([4, 4], [2, 2], 16, True, torch.float32),
        ([12, 12], [6, 6], 32, False, torch.float32),
    ],
)
def test_window_attention(windows, shift, width, local, dtype, kernel_names) -> None:
    heads = len(windows) // 2
    projection = torch.zeros(2, 16, 15, 3 * heads * width, dtype=dtype, requires_grad=True)
    table = torch.zeros(2 * windows[0] - 1, 2 * windows[1] - 1, heads) if heads == 1 else None
    fill = torch.zeros(3 * heads * width) if heads == 1 else None
    weight = torch.zeros(heads * width, 1, 3, 3) if local else None
    y, _ = torch.ops.linsight.window_attention(
        projection, table, fill, weight, weight[:, 0, 0, 0] if local else None,
        heads, windows, shift, "end",
    )  # fmt: skip
    y.backward(y.detach())
    streamed = {"_query_gradient", "_key_gradient"}
    assert "_attend" in kernel_names
    assert (
        streamed <= set(kernel_names)
        if max(windows) > 7 and width > 24
        else "_gradient" in kernel_names
    )
    assert ("_sum_pairs" in kernel_names) == (table is not None)
    assert ("_weight_gradient" in kernel_names) == local


@pytest.mark.parametrize(
    ("grid", "width", "dtype"),
    [
        ((7, 7), 64, torch.bfloat16),
        ((9, 9), 32, torch.float16),
        ((12, 12), 64, torch.bfloat16),
        ((3, 3), 64, torch.float32),
    ],
)
def test_agent_attention(grid: tuple, width: int, dtype: torch.dtype, kernel_names: list) -> None:
    count = grid[0] * grid[1]
    projection = torch.zeros(2, 197, 6 * width, dtype=dtype, requires_grad=True)
    bias = torch.zeros(2, 2, count, 197, dtype=dtype, requires_grad=True)
    weight = torch.zeros(2 * width, 1, 3, 3, requires_grad=True)
    y, *_ = torch.ops.linsight.agent_attention(
        projection, bias, weight, weight[:, 0, 0, 0], 2, 14, 14, *grid
    )
    y.backward(y.detach())
    forward = {"_pool", "_aggregate", "_broadcast"}
    token = {"_aggregate_token_gradient", "_broadcast_token_gradient"}
    agent = {"_aggregate_agent_gradient", "_broadcast_agent_gradient", "_finish"}
    assert forward | token | agent < set(kernel_names)
