"""Compile a model's kernels before it runs: `linsight warm MODEL`."""

import sys
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import timm
import torch
import typer

from linsight.backbones.graph_sums import FastSums
from linsight.backbones.initialization import shapes_only
from linsight.kernels.runtime import dispatch
from linsight.kernels.runtime.compilation import Variant, compile_pass
from linsight.kernels.runtime.private import (
    get_cache_folder,
    get_target,
    make_target,
    pretend_target,
)
from linsight.kernels.runtime.rehearsal import Pass, rehearse
from linsight.tools.info import parse_argument


def warm(
    model: Annotated[str, typer.Argument(help="A model, such as rala_vit_nano.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Its arguments: norm_layer=rmsnorm ..."),
    ] = None,
    *,
    resolutions: Annotated[
        str, typer.Option(help="Sides of images, such as 224,256 or 800x1344.")
    ] = "224",
    train: Annotated[
        bool | None,
        typer.Option("--train/--eval", help="Training or inference alone; both if not given."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of autocast: bfloat16 or float16; float32 is without it.")
    ] = "bfloat16",
    batch_size: Annotated[int, typer.Option(help="Images per pass.", min=1)] = 128,
    arch: Annotated[
        str | None, typer.Option(help="Compile for this GPU, such as sm_90, instead of the own.")
    ] = None,
) -> None:
    """Compile a model's kernels into Triton's cache, for a container's image or a cluster.

    No GPU is needed with --arch. The cache is the folder in TRITON_CACHE_DIR, or ~/.triton/cache.
    """
    start = time.monotonic()
    try:
        modes = (True, False) if train is None else (train,)
        sizes = [_parse_size(word) for word in resolutions.split(",")]
        settings = dict(map(parse_argument, arguments or ()))
        variants = compile_model(model, settings, sizes, modes, dtype, batch_size, arch)
    # Models of timm's assert that images have the size that they are made for.
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            message = (
                f"Triton's cache cannot be written: {error.filename}: {error.strerror}; set "
                "TRITON_CACHE_DIR to another folder"
            )
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None
    for (module, kernel), count in sorted(
        Counter((variant.module, variant.kernel) for variant in variants).items()
    ):
        print(f"{module.removeprefix('linsight.kernels.')}.{kernel}: {count}")
    print(
        f"{len(variants)} kernels compiled in {time.monotonic() - start:.1f} s "
        f"into {get_cache_folder()}"
    )


def compile_model(
    name: str,
    arguments: dict[str, Any],
    sizes: list[tuple[int, int]],
    modes: tuple[bool, ...],
    dtype: str,
    batch: int,
    arch: str | None = None,
) -> list[Variant]:
    """Compile what passes of a model launch and Triton's cache has not.

    Args:
        name, arguments: of timm's model.
        sizes: heights and widths of images.
        modes: True for training, False for inference.
        dtype: of autocast, or 'float32' for none.
        batch: images per pass.
        arch: such as 'sm_90'; None for the GPU of this machine.

    Returns:
        What was compiled.

    Raises:
        RuntimeError: if Triton is not installed, there is no GPU and no `arch`, timm knows no
            model of that name, or a kernel does not compile.
        ValueError: for another dtype or `arch`.
        TypeError, ValueError: by the model, if it does not take the arguments.
        OSError: if the cache cannot be written.
    """
    if not dispatch.HAS_TRITON:
        raise RuntimeError("Triton is not installed: there are no kernels to compile")
    kinds = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(kinds)}")
    if arch is None and not torch.cuda.is_available():
        raise RuntimeError(
            "there is no GPU here: name the one to compile for, such as --arch sm_90"
        )
    context: AbstractContextManager = nullcontext()
    if arch is not None:
        context = pretend_target(make_target(arch))
    with shapes_only():
        model = timm.create_model(name, **arguments)
    channels = arguments.get("in_chans", 3)
    passes = [
        Pass(
            (batch, channels, *size), torch.float32, mode, mode, kinds[dtype],
            torch.device("cuda", 0),
        )
        for mode in modes
        for size in sizes
    ]  # fmt: skip

    def rehearse_all() -> None:
        for how in passes:
            # A training records its passes, in which the sums of rows are an operator's.
            rehearse(model, how, FastSums())

    with context:
        return compile_pass(rehearse_all, get_target())


def _parse_size(word: str) -> tuple[int, int]:
    height, mark, width = word.partition("x")
    if not height.isdecimal() or not (width.isdecimal() or not mark):
        raise ValueError(f"resolution is {word!r}, expected a side such as 224, or 800x1344")
    return int(height), int(width or height)
