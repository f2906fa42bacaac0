"""The process that compiles kernels for another one: see `Compiler` in compilation.py.

It reads a line per machine code, and for each that is done writes a line: null, or an error.
"""

import contextlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

from .compilation import Variant, find_kernel
from .private import build_launcher, compile_description, pretend_target


def _compile(line: str) -> str | None:
    try:
        variant = Variant(*json.loads(line), key="")
        compiled = compile_description(find_kernel(variant), variant.description)
    except Exception as error:  # told to the process that asked
        return f"{type(error).__name__}: {error}"
    # Where it fails, for want of a compiler or of the GPU's driver, the launch tries again.
    with contextlib.suppress(Exception):
        build_launcher(compiled)
    return None


def _print_to_stderr() -> None:
    """Triton's compiler prints on stdout at times, where the answers are to stand alone."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def main() -> None:
    """Compile what stdin names for the target, by as many processes, as the arguments say."""
    from triton.backends.compiler import GPUTarget

    target, workers = GPUTarget(**json.loads(sys.argv[1])), int(sys.argv[2])
    with (
        pretend_target(target),
        # PyTorch is imported by now, once for all, and no CUDA context is made. Unlike a `Pool`,
        # this one ends when Triton's compiler crashes.
        ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), initializer=_print_to_stderr
        ) as pool,
    ):
        for compiled in as_completed([pool.submit(_compile, line) for line in sys.stdin]):
            print(json.dumps(compiled.result()), flush=True)
