"""Evaluate a checkpoint: `linsight test CONFIG CHECKPOINT`, or `python tools/test.py ...`."""

from typing import Annotated

import typer
from mmengine.config import Config
from rich.console import Console
from rich.table import Column, Table

from linsight.heads.hooks import percent
from linsight.tools.config import ConfigError, tta_of
from linsight.tools.run import (
    ConfigName,
    LauncherOption,
    Overrides,
    Words,
    WorkDir,
    build_runner,
    report_errors,
)


def test(
    config: ConfigName,
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .pth or .safetensors file, or 'pretrained' for the published ones."),
    ],
    words: Words = None,
    work_dir: WorkDir = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Test-time augmentation, for detectors of boxes.")
    ] = False,
    launcher: LauncherOption = "none",
    cfg_options: Overrides = None,
) -> None:
    """Print the metrics of a checkpoint on the test data, and draw some of its predictions."""

    def adapt(cfg: Config) -> None:
        cfg.resume = False
        if checkpoint == "pretrained" and cfg.model.type != "ImageClassifier":
            raise ConfigError(f"'pretrained' is for classifiers, not for a {cfg.model.type}")
        if checkpoint == "pretrained":
            cfg.model.backbone.pretrained = True
        else:
            cfg.load_from = checkpoint
            if cfg.model.backbone.get("pretrained"):
                cfg.model.backbone.pretrained = False
        if tta:
            hook = {"type": "PrepareTTAHook", "tta_cfg": tta_of(cfg)}
            cfg.custom_hooks = [*cfg.get("custom_hooks", ()), hook]
            cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline

    with report_errors():
        runner = build_runner(
            config, [*(cfg_options or []), *(words or [])], work_dir, launcher, adapt
        )
        metrics = runner.test()
    table = Table("metric", Column("%", justify="right"))
    for name, value in metrics.items():
        # COCO's precision is -1 for a size of which the data have no object.
        figure = f"{percent(name, value):.2f}" if value >= 0 else "-"
        table.add_row(name.rpartition("/")[2], figure)
    Console().print(table)


if __name__ == "__main__":
    typer.run(test)
