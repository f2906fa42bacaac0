"""The command line: `linsight COMMAND`."""

import sys

import typer
from rich.markup import escape

from linsight.tools import benchmark, info, models, warm

TRAINING = ("demo", "train", "test", "predict", "export", "convert")

app = typer.Typer(
    name="linsight",
    help="Vision backbones with linear attention: train, test, predict, export, benchmark.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(models.models)
app.command()(info.info)
app.command()(warm.warm)
app.command()(benchmark.benchmark)


def mount() -> None:
    """Add the commands that need the packages for training.

    Raises:
        ModuleNotFoundError: a package is missing.
    """
    from linsight.tools import convert, demo, export, predict, test, train

    for module in (demo, train, test, predict, export, convert):
        app.command()(getattr(module, module.__name__.rpartition(".")[2]))


def main() -> None:
    """Run the command that the command line names."""
    try:
        mount()
    except ModuleNotFoundError as error:
        fix = f"{error.name}: pip install 'linsight[train]'"
        if sys.argv[1:2] and sys.argv[1] in TRAINING:
            sys.exit(f"error: linsight {sys.argv[1]} needs {fix}")
        app.info.epilog = escape(f"{', '.join(TRAINING)} need {fix}")
    app()


if __name__ == "__main__":
    main()
