"""Predict a video frame by frame, and write a video of the drawings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.progress import Progress

from linsight.data.loading import DataError
from linsight.tools.prediction import Predictor

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


def predict_video(
    predictor: Predictor, file: Path, target: Path, progress: Progress
) -> list[list[tuple[Any, ...]]]:
    """Predict the frames of a video, and write their drawings to another video.

    Args:
        predictor: predictor of pictures.
        file: the video.
        target: the ``.mp4`` to write. It gets its name when it is complete.
        progress: display that shows how many frames are done.

    Returns:
        The rows of each frame.

    Raises:
        DataError: no frame can be read.
        OSError: the drawn video cannot be written.
    """
    video = cv2.VideoCapture(str(file))
    try:
        there, frame = video.read()
        if not there:
            raise DataError(f"{file} (no frame of it can be read)")
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        task = progress.add_task(file.name, total=total if total > 0 else None)
        rows = []
        with _open_writer(target, video.get(cv2.CAP_PROP_FPS) or 25.0) as write:
            while there:
                prediction = predictor(Image.fromarray(frame[..., ::-1]))
                write(np.asarray(prediction.drawing)[..., ::-1])
                rows.append(list(prediction.rows))
                progress.advance(task)
                there, frame = video.read()
        return rows
    finally:
        video.release()


@contextmanager
def _open_writer(target: Path, rate: float) -> Iterator[Any]:
    """Yield a function that writes BGR frames to a temporary file, which is renamed to `target` at
    the end."""
    beside = target.with_name(f".{target.stem}.part{target.suffix}")
    writer, count = None, 0

    def write(frame: np.ndarray) -> None:
        nonlocal writer, count
        # Encoders need even sides.
        height, width = (side // 2 * 2 for side in frame.shape[:2])
        if writer is None:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(beside), code, rate, (width, height))
            if not writer.isOpened():
                raise OSError(f"cannot write {target}: OpenCV has no encoder for it")
        writer.write(np.ascontiguousarray(frame[:height, :width]))
        count += 1

    try:
        yield write
        if writer is None:
            raise OSError(f"cannot write {target}: the video has no frames")
        writer.release()
        # OpenCV reports no error when the disk is full.
        if cv2.VideoCapture(str(beside)).get(cv2.CAP_PROP_FRAME_COUNT) != count:
            raise OSError(f"cannot write all of {target}: is the disk full?")
        os.replace(beside, target)
    finally:
        if writer is not None:
            writer.release()
        beside.unlink(missing_ok=True)
