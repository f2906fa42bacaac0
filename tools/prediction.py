"""The interface between `linsight predict` and the model of each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from linsight.tools.results import Result


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for one picture.

    Attributes:
        summary: the prediction in one line.
        rows: the prediction as rows of a table with the columns :attr:`Predictor.columns`.
        drawing: the picture with the prediction (RGB). Pictures of equal size have drawings of
            equal size.
    """

    summary: str
    rows: Sequence[tuple[Any, ...]]
    drawing: Image.Image


class Predictor(Protocol):
    """A trained model that takes pictures (RGB) one by one.

    Attributes:
        columns: names of the fields of :attr:`Prediction.rows`.
        names: names of the classes.
    """

    names: list[str]

    @property
    def columns(self) -> tuple[str, ...]: ...

    def predict(self, picture: Image.Image) -> Result:
        """The prediction as arrays."""
        ...

    def describe(self, picture: Image.Image, result: Any) -> Prediction:
        """What :meth:`predict` gave of a picture as text, rows and a drawing."""
        ...

    def __call__(self, picture: Image.Image) -> Prediction: ...


def render(figure: Figure, dpi: int = 120) -> Image.Image:
    """Draw a figure into a picture (RGB)."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
