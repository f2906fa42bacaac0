"""What `linsight predict` asks of each task's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


@dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Attributes:
        summary: one line of it.
        rows: all of it, as :attr:`Predictor.columns` names the fields.
        drawing: the picture with it (RGB); of equal size for pictures of equal size.
    """

    summary: str
    rows: Sequence[tuple[Any, ...]]
    drawing: Image.Image


class Predictor(Protocol):
    """A trained model that takes pictures (RGB) one by one.

    Attributes:
        columns: names of the fields of :attr:`Prediction.rows`.
    """

    columns: tuple[str, ...]

    def __call__(self, picture: Image.Image) -> Prediction: ...


def rendered(figure: Figure, dpi: int = 120) -> Image.Image:
    """A figure as a picture."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
