"""Predict pictures and videos: `linsight predict MODEL PICTURE_OR_FOLDER...`."""

import csv
import io
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from mmengine.config import Config
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from linsight.backbones.checkpoint import CheckpointError
from linsight.data.loading import DataError
from linsight.data.pictures import files_in, read_picture
from linsight.data.sources import ENDINGS
from linsight.heads.checkpoint import AtomicLocalBackend
from linsight.tools.config import ConfigError, check_config, override, quiet_mmdet
from linsight.tools.export_file import is_exported_file
from linsight.tools.model import open_model, read_run
from linsight.tools.predict_video import SUFFIXES, predict_video
from linsight.tools.prediction import Predictor
from linsight.tools.run import Overrides, report_errors


def predict(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, a training's folder, an exported folder or file, or a model with "
            "published weights."
        ),
    ],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, folders of them, or videos.")],
    model_name: Annotated[
        str | None,
        typer.Option("--model", help="timm's name, or a config's, where MODEL does not say it."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the drawings and the list go.")] = Path(
        "predictions"
    ),
    topk: Annotated[int, typer.Option(min=1, help="Classes that a classifier names.")] = 5,
    score: Annotated[
        float, typer.Option(min=0, max=1, help="Objects less sure than this are left out.")
    ] = 0.3,
    tta: Annotated[
        bool, typer.Option("--tta", help="Test-time augmentation, for detectors of boxes.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; default: a GPU if there is one.")
    ] = None,
    cfg_options: Overrides = None,
) -> None:
    """Predict pictures and videos, and draw the predictions."""
    with report_errors():
        place = device_of(device)
        predictor = open_predictor(model, model_name, place, topk, score, tta, cfg_options or ())
        files = find_pictures(pictures)
        drawings = _drawings(out, files)
        out.mkdir(parents=True, exist_ok=True)
        console = Console()
        table = Table("picture", "prediction")
        rows, unreadable = [], []
        with Progress(console=console, disable=len(files) == 1 and not _is_video(files[0])) as bar:
            pairs = zip(files, drawings, strict=True)
            for file, drawing in bar.track(pairs, len(files), description="Predicting"):
                try:
                    summary, found = _predict(predictor, file, drawing, bar)
                except DataError as error:
                    unreadable.append(str(error))
                    continue
                table.add_row(str(file), summary)
                rows += found
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("picture", *predictor.columns), *rows])
        AtomicLocalBackend().put_text(text.getvalue(), out / "predictions.csv")
        console.print(table)
        if unreadable:
            print(
                f"warning: {len(unreadable)} of {len(files)} pictures could not be read: "
                + ", ".join(unreadable[:5]),
                file=sys.stderr,
            )
        if len(unreadable) == len(files):
            raise DataError("no picture could be read")
        console.print(f"Drawings and predictions.csv are in {out}")


def device_of(name: str | None) -> torch.device:
    """The device that an option names; a GPU, if there is one, where it names none.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device is {name!r}, expected such as cpu or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device is {name!r}, and torch finds {torch.cuda.device_count()} GPUs")
    return device


def open_predictor(
    source: str,
    model_name: str | None,
    device: torch.device,
    topk: int = 5,
    score: float = 0.3,
    tta: bool = False,
    overrides: Sequence[str] = (),
) -> Predictor:
    """Open a model, and return the predictor for its kind.

    Args:
        source, model_name: as for :func:`~linsight.tools.model.open_model`; or a checkpoint of
            `linsight train` for any task; or a checkpoint of another origin with the name of the
            config that it fits; or a file of `linsight export`, .onnx or .pt2.
        device: device to run it on.
        topk: number of classes that a classifier reports.
        score: lowest score of the objects that a detector reports.
        tta: use test-time augmentation.
        overrides: ``key=value`` words that change the config in a checkpoint.

    Raises:
        ConfigError: the model has no test-time augmentation, or an override is wrong.
        FileNotFoundError: `source` is neither a file nor the name of a model.
        CheckpointError: the file is damaged, or holds a model of another kind.
    """
    if is_exported_file(source):
        from linsight.tools.predict_exported import ExportedPredictor

        if tta or overrides:
            raise ConfigError(f"--tta and --cfg-options change no prediction of a file, {source}")
        return ExportedPredictor(source, topk, score)
    run = read_run(source, model_name)
    kind = run.config.model.type if run else "ImageClassifier"
    if run and run.config.get("default_scope") == "mmdet":
        with quiet_mmdet():
            from linsight.tools.predict_detection import DetectionPredictor

        _change(run.config, overrides)
        return DetectionPredictor(run, source, device, score, tta)
    if tta:
        raise ConfigError(f"--tta is for detectors, and {source} is of a {kind}")
    if kind == "ImageClassifier":
        if overrides:
            raise ConfigError(f"--cfg-options changes no prediction of a {kind}")
        from linsight.tools.predict_classification import ClassificationPredictor

        return ClassificationPredictor(open_model(source, model_name), device, topk)
    if run and kind == "SemanticSegmentor":
        from linsight.tools.predict_segmentation import SegmentationPredictor

        _change(run.config, overrides)
        return SegmentationPredictor(run, source, device)
    raise CheckpointError(f"{source} is of a {kind}, with which nothing here predicts")


def _change(config: Config, overrides: Sequence[str]) -> None:
    if overrides:
        override(config, overrides)
        check_config(config)


def _predict(
    predictor: Predictor, file: Path, drawing: Path, progress: Progress
) -> tuple[str, list[tuple]]:
    """Predict a picture or a video, write its drawing, and return its summary and rows.

    Raises:
        DataError: the file cannot be read, or the model does not take its picture.
    """
    if _is_video(file):
        frames = predict_video(predictor, file, drawing, progress)
        rows = [(f"{file}#{i}", *row) for i, frame in enumerate(frames) for row in frame]
        return f"{len(frames)} frames", rows
    picture = open_picture(file)
    try:
        prediction = predictor(picture)
    except ValueError as error:  # for example, the picture is too small for the model
        raise DataError(f"{file} ({error})") from error
    content = io.BytesIO()
    prediction.drawing.save(content, "PNG")
    AtomicLocalBackend().put(content.getvalue(), drawing)
    return prediction.summary, [(str(file), *row) for row in prediction.rows]


def open_picture(file: Path) -> Image.Image:
    """Read a picture (RGB).

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return read_picture(file)
    # Pillow raises OSError, SyntaxError, ValueError, struct.error, ..., depending on the format.
    except Exception as error:
        raise DataError(f"{file} ({error})") from error


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def find_pictures(sources: Sequence[Path]) -> list[Path]:
    """The pictures and videos among files and in folders.

    Raises:
        DataError: a folder holds none, or a checkpoint is among them.
        FileNotFoundError: a file does not exist.
    """
    files: list[Path] = []
    for source in sources:
        if source.suffix == ".pth":  # of best_*.pth, where two trainings have left one each
            raise DataError(f"{source} is a checkpoint, and no picture: name one checkpoint alone")
        if source.is_dir():
            endings = (*ENDINGS, *SUFFIXES)
            found = files_in(source, endings)
            if not found:
                raise DataError(f"folder {source} holds no pictures ({', '.join(endings)})")
            files += found
        elif source.is_file():
            files.append(source)
        else:
            raise FileNotFoundError(f"picture {source} does not exist")
    return list(dict.fromkeys(files))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _joined(*parts: str) -> str:
    """One name of several, which begins with no dot, as names of hidden files do."""
    return "_".join(part.replace("/", "") for part in parts).lstrip(".")


def _drawings(out: Path, files: list[Path]) -> list[Path]:
    """Files of the drawings, each named like its picture or video.

    Where names would be equal, those of files in one folder get their endings, and others the names
    of their folders. Names are equal where a file system may take them for equal: in another case,
    or in another form of Unicode.

    Raises:
        DataError: a drawing would overwrite a picture.
    """
    whole = [_folded(str(file.with_suffix(""))) for file in files]
    kinds = Counter(whole)
    bases = [
        file.stem if kinds[name] == 1 else file.name
        for file, name in zip(files, whole, strict=True)
    ]
    depths = [1] * len(files)
    while True:
        names = [
            _joined(*file.parent.parts[len(file.parent.parts) + 1 - depth :], base)
            for file, base, depth in zip(files, bases, depths, strict=True)
        ]
        counts = Counter(map(_folded, names))
        deeper = [
            i
            for i, name in enumerate(names)
            if counts[_folded(name)] > 1 and depths[i] <= len(files[i].parent.parts)
        ]
        if not deeper:
            break
        for i in deeper:
            depths[i] += 1
    taken: set[str] = set()
    for i, name in enumerate(names):
        # Folders and names that are joined to the same word.
        number = 1
        while _folded(names[i]) in taken:
            number += 1
            names[i] = f"{name}_{number}"
        taken.add(_folded(names[i]))
    drawings = [
        out / f"{name}.{'mp4' if _is_video(file) else 'png'}"
        for name, file in zip(names, files, strict=True)
    ]
    sources = {file.resolve() for file in files}
    if lost := [drawing for drawing in drawings if drawing.resolve() in sources]:
        raise DataError(f"the drawing {lost[0]} would overwrite a picture: give another --out")
    return drawings
