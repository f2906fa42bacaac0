"""Give a pretrained vision transformer linear attention: `linsight linearise MODEL`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from mmengine.config import Config
from rich.console import Console
from timm.layers import to_2tuple
from torch import nn

from linsight.backbones.checkpoint import TimmModel
from linsight.backbones.conversion import convert_timm_model
from linsight.backbones.linearise import swap_mixers
from linsight.heads.linearisation import Agreement
from linsight.tools.config import ConfigError
from linsight.tools.export import write_safetensors
from linsight.tools.linearise_report import (
    compare_attention,
    compare_blocks,
    compare_sizes,
    draw_features,
    table,
)
from linsight.tools.model import open_model
from linsight.tools.run import Overrides, build_runner, lock_work_dir, report_errors
from linsight.tools.schedule import set_epochs


def linearise(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, an exported folder, or the name of a model.")
    ],
    mixer: Annotated[str, typer.Option(help="Name of the linear token mixer.")] = "mala",
    data: Annotated[Path | None, typer.Option(help="Folder of pictures; no labels.")] = None,
    keep_last: Annotated[
        int, typer.Option(min=0, help="Number of last blocks that keep softmax attention.")
    ] = 0,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the training images; default: the model's.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.")] = None,
    config: Annotated[
        str | None, typer.Option(help="Name of a config, or a path; needed without --data.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="timm's name, for files that do not name their model.")
    ] = None,
    work_dir: Annotated[
        Path, typer.Option(help="Where weights, logs, figures and the report go.")
    ] = Path("work_dirs/linearise"),
    report_sizes: Annotated[
        str | None,
        typer.Option(help="Sides of images to compare the models at, such as 224,518,1036."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the work dir.")
    ] = False,
    cfg_options: Overrides = None,
) -> None:
    """Swap a model's softmax attention for a linear mixer, and train that to agree with it."""
    with report_errors():
        teacher = convert_timm_model(open_model(model, model_name))
        depth = len(teacher.block_places())
        if keep_last >= depth:
            raise ConfigError(f"--keep-last is {keep_last}, expected less than {depth} blocks")
        train_student(
            teacher,
            mixer,
            range(depth - keep_last),
            data=data,
            image_size=image_size,
            epochs=epochs,
            batch_size=batch_size,
            config=config,
            work_dir=work_dir,
            report_sizes=None if report_sizes is None else _sizes(report_sizes),
            resume=resume,
            cfg_options=cfg_options,
        )
        report = json.loads((work_dir / "report.json").read_text())
        rows = report.pop("sizes")
        print(json.dumps(report, indent=2))
        Console().print(table(rows))
        print(f'Load it with timm.create_model("local-dir:{work_dir}/student", pretrained=True)')


def train_student(
    model: nn.Module,
    mixer: str,
    blocks: Iterable[int] | None = None,
    mixer_options: dict | None = None,
    *,
    data: str | Path | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    config: str | None = None,
    work_dir: str | Path = "work_dirs/linearise",
    report_sizes: Sequence[int] | None = None,
    resume: bool = False,
    cfg_options: list[str] | None = None,
) -> TimmModel:
    """Train a copy of a model, with another mixer, to agree with the model.

    The work dir gets the teacher and the student as folders that timm loads, ``report.json`` with
    their agreement on the pictures kept apart before and after the training, by image size with
    speed and memory, and by the number of linear blocks (``linear_blocks.png``);
    ``features.png``, the features of pictures kept apart in colours; ``block_errors.png``; and
    what every training writes.

    Args:
        model, mixer, blocks, mixer_options: as for
            :func:`linsight.backbones.linearise.swap_mixers`.
        data: folder of pictures, of which every tenth is kept apart.
        image_size: side of the training images in pixels; by default the model's own.
        epochs, batch_size: by default the config's.
        config: name or path of a config; by default ``linearise_pictures``, which needs `data`.
        work_dir: folder for the results.
        report_sizes: sides in pixels of the square images at which the report compares the models;
            by default `image_size` and its double.
        resume: whether to go on from the last checkpoint in the work dir.
        cfg_options: ``key=value`` words that change the config.

    Returns:
        The student in evaluation mode.

    Raises:
        ConfigError: neither `data` nor `config` is given, or the config is wrong.
        ValueError: see `swap_mixers`.
        DataError: the folder is missing or has no picture.
    """
    if data is None and config is None:
        raise ConfigError("data: give a folder of pictures by --data, or a config by --config")
    # A wrong model, mixer or block is an error before anything is written.
    swap_mixers(model, mixer, blocks, mixer_options)
    teacher: Any = copy(convert_timm_model(model))
    # A model that is built for another size or other channels has the settings of its weights.
    size = teacher.model_args.get("img_size") or teacher.pretrained_cfg["input_size"][1:]
    shape = (teacher.in_chans, *to_2tuple(size))
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "input_size": shape}
    work_dir = Path(work_dir).resolve()
    with lock_work_dir(work_dir):
        chosen = None if blocks is None else list(blocks)
        write_safetensors(teacher, work_dir / "teacher")
        size = image_size or teacher.pretrained_cfg["input_size"][-1]
        looks = {
            key: teacher.pretrained_cfg[key]
            for key in ("mean", "std", "interpolation")
            if teacher.pretrained_cfg.get(key)
        }

        def adapt(cfg: Config) -> None:
            folder = f"local-dir:{work_dir / 'teacher'}"
            cfg.model.teacher = {"model_name": folder, "pretrained": True}
            cfg.model.update(mixer=mixer, blocks=chosen, mixer_options=mixer_options)
            if not teacher.num_classes:
                cfg.model.stages.pop("logits", None)
            for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
                loader.dataset.transform.update(input_size=size, **looks)
                if data is not None:
                    loader.dataset.root = str(data)
            if batch_size is not None:
                cfg.train_dataloader.batch_size = batch_size
            if epochs is not None:
                set_epochs(cfg, epochs)
            cfg.resume = resume

        overrides = list(cfg_options or [])
        if data is not None:
            overrides.append(f"data_root={data}")
        runner = build_runner(config or "linearise_pictures", overrides, work_dir, adapt=adapt)
        before = agreement(runner.model, runner.val_dataloader)
        runner.train()
        report = {
            "teacher": teacher.pretrained_cfg["architecture"],
            "mixer": mixer,
            "blocks": cast(Any, runner.model).swapped,
            "image_size": size,
            "swapped, untrained": before,
            "trained": agreement(runner.model, runner.val_dataloader),
        }
        trained: Any = runner.model
        student = trained.backbone.eval()
        pictures, device = runner.cfg.val_dataloader.dataset, next(student.parameters()).device
        teacher = trained._teacher[0].to(device)
        sizes = report_sizes or (size, 2 * size)
        report["sizes"] = compare_sizes(teacher, student, pictures, sizes, device)
        report["attention"] = compare_attention(teacher, student, pictures, size, device)
        report["linear blocks"] = compare_blocks(
            teacher,
            student,
            trained.swapped,
            pictures,
            size,
            device,
            work_dir / "linear_blocks.png",
        )
        draw_features(teacher, student, pictures, size, device, work_dir / "features.png")
        (work_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        write_safetensors(student.cpu(), work_dir / "student")
        return student


def _sizes(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"--report-sizes is {text!r}, expected sides such as 224,518,1036")
    return [int(word) for word in words]


@torch.no_grad()
def agreement(model: Any, loader: Any) -> dict[str, float]:
    """The values of :class:`~linsight.heads.linearisation.Agreement` over a data loader."""
    model.eval()
    results = [result for batch in loader for result in model.val_step(batch)]
    return {name: round(value, 4) for name, value in Agreement().compute_metrics(results).items()}


if __name__ == "__main__":
    typer.run(linearise)
