"""What a trained model says of a picture, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Classes:
    """The classes of a picture.

    Attributes:
        names: names of the classes.
        scores: probability of each class, float32 (C,).
    """

    names: list[str]
    scores: np.ndarray

    @property
    def name(self) -> str:
        """The most probable class."""
        return self.names[int(self.scores.argmax())]

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """Names and probabilities of the most probable classes, the best first."""
        order = np.argsort(-self.scores, kind="stable")[:count]
        return [(self.names[i], float(self.scores[i])) for i in order]


@dataclass(frozen=True)
class Objects:
    """The objects in a picture.

    Attributes:
        names: names of all classes.
        boxes: float32 (N, 4), left, top, right and bottom in pixels.
        scores: float32 (N,), 0 to 1.
        labels: int64 (N,), the class of each.
        masks: bool (N, H, W), or None of a detector of boxes.
    """

    names: list[str]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def to_supervision(self) -> Any:
        """The objects as ``supervision.Detections``.

        Raises:
            ModuleNotFoundError: the package supervision is not installed.
        """
        import supervision  # pyright: ignore[reportMissingImports]

        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.labels,
            mask=self.masks,
            data={"class_name": np.array([self.names[i] for i in self.labels], dtype=str)},
        )


@dataclass(frozen=True)
class Regions:
    """The class of each pixel of a picture.

    Attributes:
        names: names of all classes.
        labels: int64 (H, W), the class of each pixel.
    """

    names: list[str]
    labels: np.ndarray

    def shares(self) -> dict[str, float]:
        """The share of the pixels that each class has, the largest first; without absent ones."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.names))
        order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
        return {self.names[i]: float(counts[i] / self.labels.size) for i in order}


Result = Classes | Objects | Regions
