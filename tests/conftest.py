"""What holds for all tests: their random numbers, and which of them take too long for each run.

Random numbers are fixed, or with --random-seed others, whose seed is printed. A test marked slow
tries at another size, model or package what a quicker one tries too; --slow runs it.
"""

import functools
import importlib.util
import os
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

FIXED_SEED = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-seed",
        nargs="?",
        const=random.SystemRandom().randrange(2**31),
        type=int,
        help="draw other random numbers than usual: from a fresh seed, or from this one",
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.slow:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: --slow runs it"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    drawn = config.option.random_seed is not None
    hypothesis.settings.register_profile("linsight", derandomize=not drawn, deadline=None)
    hypothesis.settings.load_profile("linsight")
    if drawn and config.option.hypothesis_seed is None:
        # hypothesis's own option, which its plugin reads after this.
        config.option.hypothesis_seed = str(config.option.random_seed)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.option.random_seed is not None:
        terminalreporter.write_line(f"repeat with --random-seed={config.option.random_seed}")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what timm's and mmdet's transforms draw from)
    torch.manual_seed(seed)


def get_seed(config: pytest.Config) -> int:
    seed = config.option.random_seed
    return FIXED_SEED if seed is None else seed


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    seed_everything(get_seed(item.config))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    # Another seed than the fixtures', so that a test's inputs are not its model's weights. A
    # fixture that serves many tests has drawn in the first of them alone.
    seed_everything(get_seed(item.config) + 1)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run, for generators of a test's own."""
    return get_seed(request.config)


@pytest.fixture(scope="session", autouse=True)
def _processes_without_transformers() -> Iterator[None]:
    """Keep transformers from the processes that tests start.

    It is here for peft alone, which users need not have. mmengine imports it where it is installed,
    and that takes half the time of a short command.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(__file__).with_name("without_transformers")
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(autouse=True)
def _scope_of_names() -> Iterator[None]:
    """Forget the scope in which a test's trainings look up names, before the next test.

    mmengine names it after the second in which a training begins: of two trainings in the same
    second, the later one would look for its names in the scope of the earlier one.
    """
    registry = sys.modules.get("mmengine.registry")
    before = registry.DefaultScope._instance_dict.copy() if registry else OrderedDict()
    yield
    if registry := sys.modules.get("mmengine.registry"):
        registry.DefaultScope._instance_dict = before


@pytest.fixture(scope="session", autouse=True)
def _index_of_mmdets_configs() -> Iterator[None]:
    """Keep what mmengine looks up in mmdet's index, of 102 files, for each config anew."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("mmengine"):
            utils = importlib.import_module("mmengine.config.utils")
            patch.setattr(utils, "load", functools.cache(utils.load))
        yield
