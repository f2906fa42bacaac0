"""Measure a checkpoint: `linsight test CONFIG CHECKPOINT`, or `python tools/test.py ...`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from mmengine.config import Config

from linsight.tools.run import build_runner, plain_errors


def test(
    config: Annotated[str, typer.Argument(help="Name of one of linsight's configs, or a path.")],
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .pth or .safetensors file, or 'pretrained' for the published ones."),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Further words after --cfg-options."),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where the results go; default: work_dirs/<config>.")
    ] = None,
    launcher: Annotated[
        Literal["none", "pytorch", "slurm", "mpi"],
        typer.Option(help="What started the processes of a distributed run."),
    ] = "none",
    cfg_options: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Change the config: a.b=1 c=2 ..."),
    ] = None,
) -> None:
    """Print top-1 and top-5 of a checkpoint, and draw some of its predictions."""

    def adapt(cfg: Config) -> None:
        cfg.resume = False
        if checkpoint == "pretrained":
            cfg.model.backbone.pretrained = True
        else:
            cfg.load_from = checkpoint

    with plain_errors():
        runner = build_runner(
            config, [*(cfg_options or []), *(words or [])], work_dir, launcher, adapt
        )
        metrics = runner.test()
    for name, value in metrics.items():
        print(f"{name.removeprefix('accuracy/')}: {value:.2f} %")


if __name__ == "__main__":
    typer.run(test)
