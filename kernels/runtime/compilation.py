"""The compilation of kernels before they are launched, in parallel.

A model's first pass launches up to a hundred kernels for the first time, and Triton compiles each
when it is launched: one after another, for a minute or two. So the first launch whose machine code
is not in Triton's cache has the whole pass rehearsed (rehearsal.py), backward pass included: on
tensors without storage, where `launch` collects what it would have compiled. Processes of their own
(compiler.py) compile that into the cache, and the pass goes on and finds it there.

All of this is a matter of speed. Where something fails, one log line says so, and kernels are
compiled when they are launched.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .private import (
    describe_launch,
    get_cache_folder,
    get_target,
    has_machine_code,
    settle_hash,
)

LOGGER = logging.getLogger("linsight")


@dataclass(frozen=True)
class Variant:
    """One machine code of a kernel.

    Args:
        module, kernel: where the kernel is defined, and its name.
        description: types, divisibility, constants and options, as `describe_launch` gives them.
        key: of the machine code in Triton's cache.
    """

    module: str
    kernel: str
    description: str
    key: str

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's constexprs, by name."""
        found = json.loads(self.description)
        names = list(found["signature"])
        keys = (names[key[0]] for key in found["constant_keys"])
        return dict(zip(keys, found["constant_vals"], strict=True))


def describe(kernel: Any, args: Iterable[Any], constants: dict[str, Any]) -> Variant | None:
    """The machine code that a launch needs, or None if this process has loaded it."""
    found = describe_launch(kernel, tuple(args), constants)
    return found and Variant(kernel.fn.__module__, kernel.fn.__name__, *found)


def is_compiled(variant: Variant) -> bool:
    """Whether Triton's cache has a machine code."""
    return has_machine_code(find_kernel(variant), variant.key)


def find_kernel(variant: Variant) -> Any:
    """The Triton kernel of a machine code; its module is imported."""
    __import__(variant.module)
    return getattr(sys.modules[variant.module], variant.kernel)


class _Collection(threading.local):
    """Of each thread what takes the variants that its launches need, or None where they run."""

    take: Callable[[Variant], None] | None = None


collection = _Collection()


def is_collecting() -> bool:
    """Whether this thread's launches are collected, and none takes place."""
    return collection.take is not None


@contextmanager
def collect_variants(take: Callable[[Variant], None]) -> Iterator[None]:
    """Collect what the launches of this thread would have compiled; none takes place.

    Args:
        take: called with each `Variant` that this process has not loaded, once.
    """
    seen: set[Variant] = set()

    def take_new(variant: Variant) -> None:
        if variant not in seen:
            seen.add(variant)
            take(variant)

    previous, collection.take = collection.take, take_new
    try:
        yield
    finally:
        collection.take = previous


def collect(kernel: Any, args: Iterable[Any], constants: dict[str, Any]) -> None:
    """Collect the machine code of one launch, within `collect_variants`."""
    variant = describe(kernel, args, constants)
    if variant is not None and collection.take is not None:
        collection.take(variant)


def count_workers() -> int:
    """Processes that compile at once: one per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores or 1


def write_start(statements: str) -> str:
    """Python code that runs statements where this library's kernels can be imported, and fast.

    The whole library imports timm and torchvision, which takes longer than many kernels do.
    """
    name = __name__.partition(".")[0]
    path = list(sys.modules[name].__path__)
    return (
        f"import sys, types; sys.path[:] = {sys.path!r}; package = types.ModuleType({name!r}); "
        f"package.__path__ = {path!r}; sys.modules[{name!r}] = package; {statements}"
    )


class Compiler:
    """Processes that compile into Triton's cache; they start at once, and import PyTorch meanwhile.

    Args:
        target: Triton's `GPUTarget` that they compile for.
        workers: how many processes.
    """

    def __init__(self, target: Any, workers: int) -> None:
        # Not by `multiprocessing`: it would run the user's script again in each process.
        code = write_start(f"from {__package__}.compiler import main; main()")
        # What they print is of no use, unless they end before their time.
        self._printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 -- `close`
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(vars(target)), str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
            start_new_session=True,
        )
        self._count = 0

    def submit(self, variant: Variant) -> None:
        """Have a machine code compiled.

        Raises:
            BrokenPipeError: the processes have ended.
        """
        assert self._process.stdin is not None
        line = json.dumps([variant.module, variant.kernel, variant.description])
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        self._count += 1

    def finish(self, report: Callable[[int, int], None]) -> None:
        """Wait until all is compiled.

        Args:
            report: called with how many machine codes are done, and how many there are.

        Raises:
            RuntimeError: a kernel did not compile, or the processes have ended before their time.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        errors, done = [], 0
        report(0, self._count)
        for done, line in enumerate(self._process.stdout, 1):
            error = json.loads(line)
            errors += [error] if error else []
            report(done, self._count)
        self._process.wait()
        if errors:
            raise RuntimeError(errors[0])
        if done < self._count:
            self._printed.seek(0)
            last = (self._printed.read().strip().splitlines() or ["nothing more"])[-1]
            raise RuntimeError(f"{done} of {self._count} kernels were compiled, then {last}")

    def close(self) -> None:
        """End the processes, also while they compile."""
        self._printed.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # of what the processes have not read
                pipe.close()
        self._process.wait()


def compile_pass(rehearse: Callable[[], None], target: Any) -> list[Variant]:
    """Compile in parallel what a pass launches and Triton's cache has not.

    Args:
        rehearse: computes the pass on tensors without storage.
        target: Triton's `GPUTarget`.

    Returns:
        What was compiled.

    Raises:
        RuntimeError: a kernel did not compile.
    """
    missing: list[Variant] = []
    compiler = Compiler(target, count_workers())

    def take(variant: Variant) -> None:
        if not is_compiled(variant):
            missing.append(variant)
            compiler.submit(variant)

    try:
        with collect_variants(take):
            rehearse()
        with _show_progress() as report:
            compiler.finish(report)
    finally:
        compiler.close()
    return missing


@contextmanager
def _show_progress() -> Iterator[Callable[[int, int], None]]:
    """One line on the terminal: compiling kernels 37/61."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = None

        def report(done: int, count: int) -> None:
            nonlocal task
            if count and task is None:
                task = progress.add_task("compiling kernels", total=count)
            elif task is not None:
                progress.update(task, completed=done)

        yield report


_pending: Callable[[], None] | None = None
_lock = threading.Lock()


def expect_pass(rehearse: Callable[[], None]) -> None:
    """Announce a pass that begins now, to be rehearsed if it meets a kernel without machine code.

    Args:
        rehearse: computes the pass on tensors without storage.
    """
    global _pending
    _pending = rehearse


def prepare_launch(kernel: Any, args: Iterable[Any], constants: dict[str, Any]) -> None:
    """Have the pass that was announced compiled, if a launch in it finds no machine code.

    `launch` calls this before Triton compiles or loads what it has not launched before.
    """
    global _pending
    settle_hash(kernel)
    if _pending is None:
        return
    with _lock:  # Another thread waits here, and finds the machine code.
        rehearse = _pending
        if rehearse is None:
            return
        try:
            variant = describe(kernel, args, constants)
            if variant is None or is_compiled(variant):
                return
            _pending = None
            with _lock_cache():
                # Another process of a distributed run may have compiled the pass meanwhile.
                if not is_compiled(variant):
                    _run_in_thread(lambda: compile_pass(rehearse, get_target()))
        except Exception as error:  # whatever it is, the launch itself goes on
            _pending = None
            LOGGER.info("kernels are compiled one by one, when they are launched: %s", error)


def _run_in_thread(function: Callable[[], Any]) -> None:
    """Call a function where no mode, hook on saved tensors or autocast of this thread holds."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@contextmanager
def _lock_cache() -> Iterator[None]:
    """Keep other processes from compiling into the cache at the same time."""
    import fcntl  # Triton's platforms have it.

    folder = Path(get_cache_folder())
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "linsight.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
