"""The command line: `linsight COMMAND`.

This package stands beside `linsight`, which imports torch. The commands that only list what there
is run in it; the others are imported from `linsight.tools` when they are called.
"""

import os
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from linsight_command.lists import configs, models

# The commands that need torch, with the first sentences of their help. `linsight --help` prints
# them without an import.
COMMANDS = {
    "info": "Versions, devices, and which kernels the operators run on: what a bug report needs.",
    "warm": "Compile a model's kernels into Triton's cache, for a container's image or a cluster.",
    "benchmark": "Check and time operators, mixers and models beside their peers.",
    "demo": "Train a rank-augmented linear-attention model on digit scenes, in minutes.",
    "check": "Look through data: classes, sizes, faults; and draw some images with their labels.",
    "train": "Train; weights, logs and figures go to the work dir.",
    "test": "Print the metrics of a checkpoint on the test data, and draw some of its predictions.",
    "predict": "Predict pictures and videos, and draw the predictions.",
    "look": "Draw a model's features as colours, its attention from a point, and a class's map.",
    "app": "Serve a page in the browser that predicts the pictures dropped on it.",
    "export": "Write a model for other programs, and check that the written model computes "
    "the same.",
    "convert": "Write a paper's released weights as safetensors under linsight's names.",
    "linearise": "Swap a model's softmax attention for a linear mixer, and train that to agree "
    "with it.",
}
# Those of them that need more than the models do.
TRAINING = (
    "demo",
    "check",
    "linearise",
    "app",
    "train",
    "test",
    "predict",
    "look",
    "export",
    "convert",
)


class Commands(TyperGroup):
    """Commands that are imported when they are called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in COMMANDS else command, rest


def load(name: str) -> Any:
    """The command of `linsight.tools` with a name, as click runs it."""
    try:
        function = getattr(import_module(f"linsight.tools.{name}"), name)
    except ModuleNotFoundError as error:
        if name not in TRAINING:
            raise
        sys.exit(f"error: linsight {name} needs {error.name}: pip install 'linsight[train]'")
    single = typer.Typer(add_completion=False)
    single.command(name)(function)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=Commands,
    name="linsight",
    help="Vision backbones with linear attention: train, test, predict, export, benchmark.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(models)
app.command()(configs)
for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"linsight {version('linsight')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command that the command line names."""
    # Threads that wait by spinning slow everything down as soon as two processes share the cores.
    # OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A module that was blocked on purpose stands in sys.modules as None, and has no spec.
    if sys.modules.get("mmengine", ...) is None or find_spec("mmengine") is None:
        app.info.epilog = escape(
            f"{', '.join(TRAINING)} need mmengine: pip install 'linsight[train]'"
        )
    app()
