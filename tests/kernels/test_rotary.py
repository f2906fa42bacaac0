"""The rotary tables and their rotation."""

import math

import pytest
import torch

from linsight.kernels import apply_rotary, rotary_tables


def test_tables_hold_the_angles_of_rows_and_columns() -> None:
    rows, columns = rotary_tables((3, 5), 16, torch.float32, torch.device("cpu"))
    assert rows.shape == (2, 3, 4)
    assert columns.shape == (2, 5, 4)
    theta = 10000 ** (-2 / 3)
    assert rows[0, 2, 2].item() == pytest.approx(math.cos(2 * theta), abs=1e-6)
    assert columns[1, 4, 2].item() == pytest.approx(math.sin(4 * theta), abs=1e-6)


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
