"""A trained model in Python: `linsight.load("best.pth").predict("picture.jpg")`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from linsight.data.pictures import prepare, read_picture
from linsight.tools.predict import open_predictor
from linsight.tools.results import Result


class LoadedModel:
    """A trained model that predicts pictures.

    Args:
        source: as for :func:`linsight.load`.
        model_name: as for :func:`linsight.load`.
        device: device to run it on; by default a GPU if there is one.
        score: lowest score of the objects that a detector reports.
    """

    def __init__(
        self,
        source: str | Path,
        model_name: str | None = None,
        device: str | torch.device | None = None,
        score: float = 0.3,
    ) -> None:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.predictor = open_predictor(str(source), model_name, place, score=score)

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        return [str(name) for name in self.predictor.names]

    def predict(self, picture: str | Path | Image.Image | np.ndarray) -> Result:
        """Predict a picture.

        Args:
            picture: a file, a PIL image, or an array uint8 (H, W, 3) in RGB or (H, W) in grey.

        Returns:
            :class:`~linsight.tools.results.Classes` of a classifier, ``Objects`` of a detector,
            ``Regions`` of a segmentor, at the size of the picture.

        Raises:
            OSError: the file is missing, or is no picture.
            ValueError: the array is no picture.
        """
        if isinstance(picture, list | tuple):
            raise ValueError(
                f"picture is a {type(picture).__name__} of {len(picture)}, expected one: give the "
                "pictures one by one"
            )
        if isinstance(picture, np.ndarray):
            shaped = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)
            if picture.dtype != np.uint8 or not shaped:
                raise ValueError(
                    f"picture is an array {picture.dtype} {picture.shape}, expected uint8 "
                    "(H, W, 3) in RGB or (H, W)"
                )
            if not picture.size:
                raise ValueError(f"picture is an array {picture.shape} without pixels")
            picture = Image.fromarray(picture)
        elif not isinstance(picture, Image.Image):
            return self.predictor.predict(read_picture(picture))
        return self.predictor.predict(prepare(picture).convert("RGB"))
