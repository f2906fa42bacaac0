"""The rotary tables and their rotation."""

import math
import random
from functools import partial

import pytest
import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.rotary import apply_rotary, rotary_tables

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager


def test_tables_hold_the_angles_of_rows_and_columns() -> None:
    rows, columns = rotary_tables((3, 5), 16, torch.float32, torch.device("cpu"))
    assert rows.shape == (2, 3, 4)
    assert columns.shape == (2, 5, 4)
    theta = 10000 ** (-2 / 3)
    assert rows[0, 2, 2].item() == pytest.approx(math.cos(2 * theta), abs=1e-6)
    assert columns[1, 4, 2].item() == pytest.approx(math.sin(4 * theta), abs=1e-6)


def test_tables_of_a_temperature_hold_the_angles_of_dinov3() -> None:
    tables = rotary_tables((3, 5), 16, torch.float32, torch.device("cpu"), 100.0)
    # Per token sines, then cosines, each of both halves of the channels, of rows and of columns.
    theirs = RotaryEmbeddingDinoV3(16, 100.0).get_embed([3, 5]).view(3, 5, 2, 2, 2, 4)
    theirs = theirs[:, :, :, 0].flip(2).movedim(2, 0)
    torch.testing.assert_close(tables, (theirs[:, :, 0, 0], theirs[:, 0, :, 1]))


def test_rotation_keeps_lengths_and_depends_on_offsets_alone() -> None:
    torch.manual_seed(0)
    rotary = rotary_tables((4, 6), 8, torch.float64, torch.device("cpu"))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    q, k = (apply_rotary(x.expand(1, 24, 1, 8), rotary)[0, :, 0] for x in (q, k))
    torch.testing.assert_close(q.norm(dim=-1), q[0].norm().expand(24))
    product = (q @ k.T).view(4, 6, 4, 6)
    torch.testing.assert_close(product[0, 0, 1, 2], product[2, 3, 3, 5], rtol=1e-6, atol=1e-6)


def test_width_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="head_dim is 6"):
        rotary_tables((2, 2), 6, torch.float32, torch.device("cpu"))


def test_tables_of_another_map_are_refused() -> None:
    rotary = rotary_tables((2, 3), 8, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="a map of 2 x 3 tokens, but x has 5"):
        apply_rotary(torch.randn(1, 5, 1, 8), rotary)


def test_kept_tables_serve_training_after_inference() -> None:
    arguments = ((3, 7), 8, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        rotary = rotary_tables(*arguments)
    x = torch.randn(1, 21, 1, 8, requires_grad=True)
    apply_rotary(x, rotary).sum().backward()
    assert rotary_tables(*arguments)[0] is rotary[0]


def rotate(x: Tensor, size: tuple[int, int]) -> Tensor:
    return apply_rotary(x, rotary_tables(size, x.shape[-1], x.dtype, x.device))


@pytest.mark.parametrize("start", [0, 1])
def test_tokens_may_begin_anywhere_in_memory(start) -> None:
    x = torch.randn(61)[start : start + 60].view(1, 5, 1, 12)
    assert torch.equal(rotate(x, (1, 5)), rotate(x.clone(), (1, 5)))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 24, 64])
def test_error_against_float64(dtype, width, device, seed) -> None:
    size = (5, 3) if device.type == "cpu" else (14, 27)
    x = torch.randn(2, size[0] * size[1], 3, 4, width, device=device)[:, :, 1]
    function = partial(rotate, size=size)
    assert_as_exact_as_eager(function, [x], dtype, torch.randn(x.shape, device=device))


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        size, width = (draw.choice((1, 3, 7)), draw.choice((1, 5, 13))), draw.choice((4, 8, 24, 64))
        batch, heads = draw.choice((1, 2)), draw.choice((1, 3))
        print(size, width, batch, heads)
        x = torch.randn(batch, size[0] * size[1], 3, heads, width, device=device)[:, :, 1]
        function = partial(rotate, size=size)
        assert_as_exact_as_eager(function, [x], torch.float32, torch.randn(x.shape, device=device))


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    def function(x: Tensor, height: int) -> Tensor:
        size = (height, x.shape[1] // height)
        return apply_rotary(x, rotary_tables(size, 8, x.dtype, x.device)) * 2

    whole = compile_whole(function)
    with force("triton"):
        for height, width in ((2, 3), (3, 5), (1, 7)):
            x = torch.randn(1, height * width, 2, 8, device=device)
            torch.testing.assert_close(whole(x, height), function(x, height))
