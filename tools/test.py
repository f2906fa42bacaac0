"""Evaluate a checkpoint: `linsight test CHECKPOINT`, or `linsight test CONFIG CHECKPOINT`.

In place of the checkpoint alone its training's work dir may stand.
"""

from pathlib import Path
from typing import Annotated

import typer
from mmengine.config import Config
from rich.console import Console
from rich.table import Column, Table

from linsight.heads.hooks import percent
from linsight.tools.config import ConfigError, tta_of
from linsight.tools.model import find_checkpoint
from linsight.tools.recipe import FILE
from linsight.tools.run import (
    LauncherOption,
    Overrides,
    Words,
    WorkDir,
    build_runner,
    report_errors,
)


def test(
    config: Annotated[
        str,
        typer.Argument(
            help="Name of a config, or a path; or a checkpoint alone, in its training's folder; or "
            "that folder."
        ),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="A .pth or .safetensors file, or 'pretrained' for the published ones."),
    ] = None,
    words: Words = None,
    work_dir: WorkDir = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Test-time augmentation, for detectors of boxes.")
    ] = False,
    launcher: LauncherOption = "none",
    cfg_options: Overrides = None,
) -> None:
    """Print the metrics of a checkpoint on the test data, and draw some of its predictions."""
    changes = [*(cfg_options or []), *(words or [])]
    if checkpoint is not None and "=" in checkpoint:
        changes, checkpoint = [checkpoint, *changes], None

    def adapt(cfg: Config) -> None:
        cfg.resume = False
        # Its hook makes the training's loop, which would read the training data.
        cfg.get("default_hooks", {}).pop("early_stopping", None)
        if checkpoint == "pretrained" and cfg.model.type != "ImageClassifier":
            raise ConfigError(f"'pretrained' is for classifiers, not for a {cfg.model.type}")
        if checkpoint == "pretrained":
            cfg.model.backbone.pretrained = True
        else:
            cfg.load_from = checkpoint
            cfg.model.backbone.pop("checkpoint", None)
            if cfg.model.backbone.get("pretrained"):
                cfg.model.backbone.pretrained = False
        if tta:
            hook = {"type": "PrepareTTAHook", "tta_cfg": tta_of(cfg)}
            cfg.custom_hooks = [*cfg.get("custom_hooks", ()), hook]
            cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline

    with report_errors():
        if checkpoint is None:
            found = find_checkpoint(config)
            checkpoint, config = str(found), _config_beside(found)
            work_dir = work_dir or Path(checkpoint).parent / "test"
        elif Path(config).suffix == ".pth":
            raise ConfigError(f"{config} and {checkpoint} are two checkpoints: name one of them")
        elif Path(config).name == FILE:  # the training's figures stay
            work_dir = work_dir or Path(config).parent / "test"
        runner = build_runner(config, changes, work_dir, launcher, adapt)
        metrics = runner.test()
    table = Table("metric", Column("%", justify="right"))
    for name, value in metrics.items():
        # COCO's precision is -1 for a size of which the data have no object.
        figure = f"{percent(name, value):.2f}" if value >= 0 else "-"
        table.add_row(name.rpartition("/")[2], figure)
    Console().print(table)


def _config_beside(checkpoint: Path) -> str:
    """The config that a training has left in the folder of its checkpoints.

    Raises:
        ConfigError: there is none, or several.
    """
    found = [] if checkpoint.suffix == ".py" else sorted(checkpoint.parent.glob("*.py"))
    if not checkpoint.exists() or len(found) != 1:
        raise ConfigError(
            f"beside the checkpoint {checkpoint} there is not the one config of its training: "
            "linsight test CONFIG CHECKPOINT"
        )
    return str(found[0])


if __name__ == "__main__":
    typer.run(test)
