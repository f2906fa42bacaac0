"""Train the model of a config: `linsight train CONFIG`, or `python tools/train.py CONFIG`."""

from typing import Annotated

import typer
from mmengine.config import Config

from linsight.tools.run import (
    ConfigName,
    LauncherOption,
    Overrides,
    Words,
    WorkDir,
    build_runner,
    report_errors,
)


def train(
    config: ConfigName,
    words: Words = None,
    work_dir: WorkDir = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint in the work dir, or from the file named after it.",
        ),
    ] = False,
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision; needs a GPU.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the backbone.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log for TensorBoard as well.")
    ] = False,
    launcher: LauncherOption = "none",
    cfg_options: Overrides = None,
) -> None:
    """Train; weights, logs and figures go to the work dir."""
    words = words or []
    # OpenMMLab writes `--resume [CKPT]`: the checkpoint is the word that is no KEY=VALUE.
    checkpoints = [word for word in words if resume and "=" not in word]
    overrides = [*(cfg_options or []), *(word for word in words if word not in checkpoints)]

    def adapt(cfg: Config) -> None:
        cfg.resume = resume or cfg.get("resume", False)
        if checkpoints:
            cfg.load_from = checkpoints[-1]
        if amp and cfg.optim_wrapper.get("type") != "AmpOptimWrapper":
            cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
        if compile:
            # Of detectors only the backbone compiles; the work after it depends on the objects.
            whole = cfg.model.type in ("ImageClassifier", "SemanticSegmentor")
            part = cfg.model if whole else cfg.model.backbone
            part.compile = True
        if tensorboard:
            backends = [{"type": "LocalVisBackend"}, {"type": "TensorboardVisBackend"}]
            cfg.visualizer = {"type": "Visualizer", "vis_backends": backends}

    with report_errors():
        build_runner(config, overrides, work_dir, launcher, adapt).train()


if __name__ == "__main__":
    typer.run(train)
