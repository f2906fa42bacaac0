"""How sequences and maps are shared out to programs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from linsight.kernels.runtime.launch import MOST_SPLITS, Tile, cut_evenly, split_tokens

CPU = torch.device("cpu")


@given(st.integers(1, 3000))
def test_every_even_part_is_found(size: int) -> None:
    found = cut_evenly(size)
    assert found == sorted(set(found), reverse=True)
    assert (
        {-(-size // count) for count in range(1, size + 1)} <= set(found) <= {*range(1, size + 1)}
    )
    # Few enough to try them all when a plan is made.
    assert len(found) <= 2 * size**0.5 + 2


def test_nothing_is_one_part() -> None:
    assert cut_evenly(0) == [1]


@given(
    rows=st.integers(0, 300),
    tokens=st.integers(0, 70_000),
    least=st.sampled_from([128, 256]),
    few=st.sampled_from([1, 64]),
)
def test_all_tokens_are_shared_out(rows: int, tokens: int, least: int, few: int) -> None:
    splits, each = split_tokens(Tile(64, 4, 2, 3, least), rows, tokens, CPU, few)
    assert each % 64 == 0
    assert (splits - 1) * each < max(tokens, 1) <= max(splits * each, 1)
    assert splits <= min(MOST_SPLITS, max(1, tokens // least, few))


def test_a_short_sequence_is_shared_by_few_more(monkeypatch) -> None:
    """One image of 224 px: 49 blocks of 64 tokens; a map with work for all has the same as ever."""
    monkeypatch.setattr("linsight.kernels.runtime.launch.count_multiprocessors", lambda device: 132)
    tile = Tile(64, 4, 2, 3, 256)
    assert split_tokens(tile, 1, 3136, CPU) == (10, 320)
    assert split_tokens(tile, 1, 3136, CPU, few=64) == (49, 64)
    for rows, tokens in ((64, 3136), (128, 784), (1, 65536), (2, 16384)):
        assert split_tokens(tile, rows, tokens, CPU, few=64) == split_tokens(
            tile, rows, tokens, CPU
        )
