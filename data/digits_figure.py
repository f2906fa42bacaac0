"""Draw the digit scenes: ``python -m linsight.data.digits_figure [PNG]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import numpy as np

from .digits import DETECTION, Scene, digit_scene


def draw_digit_scenes(path: str | Path) -> None:
    """Write a picture of scenes with their classes, boxes, instance masks and semantic masks.

    The scenes are drawn without noise, which a PNG cannot compress.

    Args:
        path: the PNG to write, 1200 pixels wide.

    Raises:
        ImportError: matplotlib, scikit-learn or OpenCV is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    palette = np.array(
        [(0.09, 0.1, 0.13), *_tab10()]  # the background, then the digits 0 to 9
    )
    figure = Figure(figsize=(12, 6.85), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.add_gridspec(
        3,
        1,
        height_ratios=[1.12, 2.12, 2.12],
        left=0.012,
        right=0.988,
        top=0.93,
        bottom=0.06,
        hspace=0.14,
    )

    def axes(row: int, columns: int, title: str) -> list:
        grid = rows[row].subgridspec(1, columns, wspace=0.04)
        cells = [figure.add_subplot(cell) for cell in grid]
        for cell in cells:
            cell.set_axis_off()
        cells[0].set_title(
            title, loc="left", fontsize=12, fontweight="bold", pad=21 if row == 0 else 6
        )
        return cells

    for index, cell in enumerate(axes(0, 10, "Classification"), 516):  # the beginning of a form
        scene = digit_scene(index, "train", size=128, noise=0)
        cell.imshow(scene.image)
        cell.text(
            0.5, 1.04, str(scene.labels[0]), transform=cell.transAxes, ha="center", fontsize=12
        )

    scenes = [_crowd(index) for index in range(4)]
    for scene, cell in zip(scenes, axes(1, 4, "Detection and instance segmentation"), strict=True):
        cell.imshow(_tint(scene, palette))
        for label, (x1, y1, x2, y2) in zip(scene.labels, scene.boxes, strict=True):
            colour = palette[label + 1]
            cell.add_patch(
                Rectangle((x1 - 1, y1 - 1), x2 - x1 + 1, y2 - y1 + 1, fill=False, ec=colour, lw=1.8)
            )
            cell.text(
                x1, max(y1 - 4, 11), str(label), fontsize=9, fontweight="bold", color="white",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip

    for scene, cell in zip(scenes, axes(2, 4, "Semantic segmentation"), strict=True):
        cell.imshow(
            scene.semantic, cmap=ListedColormap(palette), vmin=0, vmax=10, interpolation="nearest"
        )
    figure.legend(
        handles=[
            Patch(color=colour, label=name)
            for colour, name in zip(palette, ["background", *"0123456789"], strict=True)
        ],
        loc="lower center", ncols=11, frameon=False, handlelength=1, columnspacing=1.6,
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True})


def _tab10() -> list[tuple[float, float, float]]:
    from matplotlib import color_sequences

    return cast(list[tuple[float, float, float]], color_sequences["tab10"])


def _crowd(index: int) -> Scene:
    settings = {**DETECTION, "size": (208, 288), "digits": (6, 9), "digit_size": (0.22, 0.42)}
    return digit_scene(index, "train", seed=5, noise=0, **settings)


def _tint(scene: Scene, palette: np.ndarray) -> np.ndarray:
    """The image with each digit tinted in the colour of its class."""
    colours = palette[scene.semantic] * 255
    weight = 0.5 * (scene.semantic > 0)[..., None]
    return (scene.image * (1 - weight) + colours * weight).astype(np.uint8)


if __name__ == "__main__":
    draw_digit_scenes(sys.argv[1] if len(sys.argv) > 1 else "docs/assets/digit_scenes.png")
