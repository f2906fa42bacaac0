"""How the kernels' tests find a device for the Triton code.

On a machine with a GPU it runs there. Without one it runs under Triton's interpreter, which
must be chosen before Triton is first imported, and then holds for the whole process: so these
tests are skipped in the main run, and `make test` has another run for them.
"""

import os
from collections.abc import Callable

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("triton") and DEVICE.type == "cpu" and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="no GPU: runs where TRITON_INTERPRET=1"))
        if item.get_closest_marker("gpu") and DEVICE.type == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "triton: runs Triton kernels, on a GPU or under Triton's interpreter"
    )


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def random_cases() -> range:
    """A turn for each random shape: few under the interpreter, or LINSIGHT_TEST_CASES of them."""
    return range(int(os.environ.get("LINSIGHT_TEST_CASES", 12 if DEVICE.type == "cuda" else 2)))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, tiles so small that a small map has several tiles and splits."""
    if INTERPRETED:
        from linsight.kernels.flow_attention import plan as flow
        from linsight.kernels.focused_linear_attention import plan as focused
        from linsight.kernels.gaussian_attention import plan as gaussian
        from linsight.kernels.landmark_kernel import plan as landmark
        from linsight.kernels.linear_attention import plan as linear
        from linsight.kernels.mixed_state_attention import plan as mixed
        from linsight.kernels.polarity_attention import plan as polarity
        from linsight.kernels.runtime.launch import Tile
        from linsight.kernels.softmax_attention import plan as softmax
        from linsight.kernels.window_pool import plan as pool

        tile = Tile(block=16, warps=1, stages=1, resident=2, least=16)
        monkeypatch.setattr(linear, "choose_tile", lambda *args: tile)
        monkeypatch.setattr(flow, "choose_tile", lambda *args: tile)
        monkeypatch.setattr(focused, "FORWARD_ELEMENTS", 128)
        monkeypatch.setattr(focused, "BACKWARD_ELEMENTS", 128)
        monkeypatch.setattr(mixed, "choose_tile", lambda *args: mixed.Tile(16, 16, 1, 1, 2))
        monkeypatch.setattr(mixed, "choose_state_tile", lambda *args: (16, 1, 1))
        monkeypatch.setattr(mixed, "MIXED_ELEMENTS", 1024)
        monkeypatch.setattr(gaussian, "choose_tile", lambda *args: tile)
        monkeypatch.setattr(gaussian, "MOST_LANDMARKS", 16)
        monkeypatch.setattr(landmark, "MOST_LANDMARKS", 16)
        monkeypatch.setattr(polarity, "ROWS", 4)
        monkeypatch.setattr(softmax, "choose_tiles", lambda *args: (tile, tile))
        monkeypatch.setattr(pool, "POOLED", 128)
        monkeypatch.setattr(pool, "SPREAD", 128)
        monkeypatch.setattr(pool, "RUN", 4)


def compile_whole(function: Callable) -> Callable:
    """`function` under torch.compile, whole; without a GPU the graph alone is under test."""
    torch.compiler.reset()
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    return torch.compile(function, fullgraph=True, backend=backend)
