"""The rule that says what runs, and what is kept from one call to the next."""

from types import SimpleNamespace

import torch

from linsight.kernels.runtime.dispatch import cache_constants


def test_a_compiler_is_not_asked_about_the_stream(monkeypatch):
    """The question whether a CUDA graph is captured would break a compiler's graph."""

    def refuse() -> bool:
        raise AssertionError("the stream was asked for under a compiler")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refuse)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    made = []
    get = cache_constants(lambda length, device: made.append(length))
    device = SimpleNamespace(type="cuda")
    get(3, device)
    get(3, device)
    assert made == [3, 3]


def test_constants_are_made_once_per_key():
    made = []

    def make(length: int, device: torch.device) -> torch.Tensor:
        made.append(length)
        return torch.ones(length, device=device)

    get = cache_constants(make)
    device = torch.device("cpu")
    assert get(3, device) is get(3, device)
    get(4, device)
    assert made == [3, 4]
