"""A page in the browser that predicts dropped pictures: `linsight app MODEL`."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from linsight.tools.config import ConfigError
from linsight.tools.predict import device_of, open_predictor
from linsight.tools.run import report_errors


def app(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint, a training's folder, an exported folder or file, or a model with "
            "published weights; default: the newest checkpoint in work_dirs."
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option("--model", help="timm's name, or a config's, where MODEL does not say it."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    score: Annotated[
        float, typer.Option(min=0, max=1, help="Objects less sure than this are left out.")
    ] = 0.3,
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Larger pictures are refused; default: what memory holds."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; default: a GPU if there is one.")
    ] = None,
) -> None:
    """Serve a page in the browser that predicts the pictures dropped on it."""
    with report_errors():
        # Gradio reads this when it is imported. With it, and with fonts of its own, neither the
        # server nor the page asks anything of another machine.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            from linsight.tools.app_page import launch
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            sys.exit("error: linsight app needs gradio: pip install 'linsight[app]'")
        check_address(host, port)
        source = model or newest_checkpoint()
        place = device_of(device)
        predictor = open_predictor(source, model_name, place, score=score)
        launch(predictor, f"linsight: {source}", place, max_pixels, host, port)


def newest_checkpoint() -> str:
    """The checkpoint of `linsight train` that was written last.

    Raises:
        ConfigError: there is none.
    """
    found = Path("work_dirs").glob("*/best_*.pth")
    newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        raise ConfigError(
            "there is no work_dirs/*/best_*.pth here: give a checkpoint, an exported folder or "
            "file, or a model with published weights, such as linsight app rala_vit_tiny"
        )
    return str(newest)


def check_address(host: str, port: int) -> None:
    """Check that a server can listen, before the model is opened.

    Raises:
        ConfigError: the address is none of this machine, or the port is taken or reserved.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: no server can listen there ({error.strerror}); give "
            "127.0.0.1 or another address of this machine, and a free port such as "
            f"{port + 1 if 1024 <= port < 65535 else 7860}"
        ) from None
