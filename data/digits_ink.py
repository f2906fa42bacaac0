"""Drawing of digit scenes: paper, handwriting in ink, and distractors.

Images are float32 (H, W, 3), RGB, 0 to 1. Ink is float32 (h, w), from 0 (no ink) to 1 (opaque).
"""

from __future__ import annotations

import math

import numpy as np

_CELLS = 8  # a digit of scikit-learn has 8x8 cells
_MARGIN = 0.5  # in cells: smoothed strokes fade out over this distance
_PADDING = 2  # in cells: the reach of the cubic kernel
_OVERSAMPLING = 4  # pixels of a field per cell
_KNOTS = 4  # per side of a distortion: few enough that strokes bend without trembling
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def _cv2():
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "drawing the digits needs OpenCV, which is not installed: pip install 'linsight[train]'"
        ) from error
    return cv2


def smooth(images: np.ndarray) -> np.ndarray:
    """Fields of ink, float32 (n, 48, 48), from digits of 8x8 cells, uint8 (n, 8, 8) in 0..16."""
    cv2 = _cv2()
    padded = np.pad(images.astype(np.float32) / 16, ((0, 0), *[(_PADDING, _PADDING)] * 2))
    side = padded.shape[1] * _OVERSAMPLING
    fields = []
    for digit in padded:
        # A slight blur turns the staircase of the 8x8 grid into a pen's stroke. Unsharp masking
        # with a wide blur reopens the holes that the coarse grid has nearly filled.
        field = cv2.resize(digit, (side, side), interpolation=cv2.INTER_CUBIC)
        field = cv2.GaussianBlur(field, (0, 0), 0.3 * _OVERSAMPLING)
        fields.append(field + 1.6 * (field - cv2.GaussianBlur(field, (0, 0), 1.2 * _OVERSAMPLING)))
    return np.stack(fields)


def background(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, float]:
    """Paper with a colour gradient and a soft texture, float32 (H, W, 3), and its luminance."""
    cv2 = _cv2()
    paper = rng.uniform(0.05, 0.95)
    gradient = _colour(rng, paper, 0.12) + rng.uniform(-0.1, 0.1, (2, 2, 3))
    cells = rng.integers(3, 9)
    texture = rng.uniform(0, 0.08) * rng.standard_normal((cells, cells, 1))
    image = cv2.resize(gradient.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    spots = cv2.resize(texture.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return image + spots[..., None], paper


def _colour(rng: np.random.Generator, luminance: float, chroma: float) -> np.ndarray:
    """A random colour of the given luminance, float32 (3,) in 0..1."""
    tint = rng.uniform(-chroma, chroma, 3).astype(np.float32)
    return (luminance + tint - tint @ _LUMA).clip(0, 1)


def ink_colour(rng: np.random.Generator, paper: float, least: float, most: float) -> np.ndarray:
    """A random colour whose luminance differs from the paper's by ``least`` to ``most``."""
    contrast = rng.uniform(least, min(most, max(paper, 1 - paper)))
    inks = [ink for ink in (paper - contrast, paper + contrast) if 0 <= ink <= 1]
    return _colour(rng, inks[rng.integers(len(inks))], 0.3)


def write(
    rng: np.random.Generator, field: np.ndarray, extent: float, distortion: float = 0.0
) -> np.ndarray:
    """The ink, float32 (h, w), of a digit after a random rotation, shear and narrowing.

    Its longer side has ``extent`` pixels. ``distortion`` is the standard deviation, in cells, of
    the displacement of its parts.
    """
    cv2 = _cv2()
    angle, shear = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15)
    narrow = rng.uniform(0.75, 1.0)
    cos, sin = math.cos(angle), math.sin(angle)
    # The map from the digit's frame to the image, up to scale: narrow, then shear, then rotate.
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[narrow, shear], [0, 1]])
    reach = np.abs(forward).sum(1)
    scale = extent / reach.max()
    width, height = np.ceil(scale * reach).astype(int)
    cells = _CELLS + 2 * _MARGIN
    inverse = np.linalg.inv(forward) * (cells * _OVERSAMPLING / scale)
    if distortion:
        field = _distort(rng, field, distortion)
    centre = (len(field) - 1) / 2
    shift = centre - inverse @ [(width - 1) / 2, (height - 1) / 2]
    ink = cv2.warpAffine(
        field,
        np.column_stack([inverse, shift]),
        (int(width), int(height)),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
    )
    # The level at which ink ends makes the pen thin or thick; the slope makes it sharp or soft.
    level, slope = rng.uniform(0.4, 0.62), rng.uniform(2, 5)
    ink = ((ink - level) * slope + 0.5).clip(0, 1)
    x1, y1, x2, y2 = tight_box(ink > 0)
    return ink[y1:y2, x1:x2]


def _distort(rng: np.random.Generator, field: np.ndarray, distortion: float) -> np.ndarray:
    """Displace a field smoothly at random (Simard et al., ICDAR 2003, section 2)."""
    cv2 = _cv2()
    side = len(field)
    knots = rng.normal(0, distortion * _OVERSAMPLING, (_KNOTS, _KNOTS, 2)).astype(np.float32)
    shift = cv2.resize(knots, (side, side), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    return cv2.remap(field, x + shift[..., 0], y + shift[..., 1], cv2.INTER_LINEAR)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around the pixels of a mask that is not empty; x2 and y2 are exclusive."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def draw_distractor(
    rng: np.random.Generator,
    image: np.ndarray,
    paper: float,
    fields: np.ndarray,
    smallest: float,
) -> None:
    """Draw a line, a blob or a piece of a digit onto the image in faint ink."""
    cv2 = _cv2()
    height, width = image.shape[:2]
    colour = ink_colour(rng, paper, 0.15, 0.35)
    kind = rng.integers(3)
    if kind == 0:
        # The line runs from edge to edge, since a short line would look like a 1.
        ends = rng.uniform(0, 1, (2, 2)) * [width, height]
        axis = rng.integers(2)
        ends[:, axis] = -2, (width, height)[axis] + 2
        thick = max(1, round(smallest * rng.uniform(0.02, 0.08)))
        start, stop = (tuple((16 * end).astype(int).tolist()) for end in ends)
        cv2.line(image, start, stop, colour.tolist(), thick, cv2.LINE_AA, shift=4)
        return
    # A piece is smaller than half of the smallest digit and a quarter of the digit that it is cut
    # from, so that it shows neither a whole digit nor a loop that would look like a 0.
    extent = smallest * rng.uniform(0.2, 0.45)
    side = max(3, math.ceil(extent))
    axes = side / 2 * (rng.uniform(0.4, 1, 2) if kind == 1 else np.ones(2))
    ys, xs = np.mgrid[:side, :side] - (side - 1) / 2
    disc = (3 * (1 - (xs / axes[0]) ** 2 - (ys / axes[1]) ** 2)).clip(0, 1).astype(np.float32)
    if kind == 1:
        shape = disc
    else:
        ink = write(rng, fields[rng.integers(len(fields))], max(4 * extent, _CELLS))
        h, w = ink.shape
        y, x = rng.integers(max(1, h - side + 1)), rng.integers(max(1, w - side + 1))
        shape = ink[y : y + side, x : x + side] * disc[: h - y, : w - x]
    h, w = shape.shape
    y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
    image[y : y + h, x : x + w] += shape[..., None] * (colour - image[y : y + h, x : x + w])
