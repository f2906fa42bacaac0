"""Collect the photographs that installed packages ship: `python -m linsight.tools.photographs`.

They are few, but of many kinds, and need no download: enough to see whether a model with linear
attention agrees with its teacher on photographs that it was not trained on. Collages of their
pieces add edges and neighbours that the photographs do not have.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from rich.progress import track

# Photographs by split, as package and file. Nothing in "val" resembles one in "train".
PHOTOGRAPHS = {
    "train": {
        "skimage": "brick.png camera.png cell.png coins.png coffee.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg",
        "sklearn": "flower.jpg",
        "matplotlib": "grace_hopper.jpg",
        "deepforest": "2019_YELL_2_541000_4977000_image_crop.png SOAP_061.png OSBS_029.png",
        "gradio": "cheetah.jpg groot.jpeg tower.jpg",
    },
    "val": {
        "skimage": "astronaut.png chelsea.png rocket.jpg",
        "sklearn": "china.jpg",
        "deepforest": "2019_YELL_2_528000_4978000_image_crop2.png",
    },
}


# Side of a collage in pixels.
SIDE = 800


def collect(
    out: Annotated[Path, typer.Argument(help="Folder, which gets sub-folders train and val.")],
    collages: Annotated[
        int,
        typer.Option(
            min=0,
            help="Add this many collages of pieces of the training photographs, and copies of "
            "these until they are as many.",
        ),
    ] = 0,
) -> None:
    """Copy the photographs that installed packages ship, as JPEG files, for a first try."""
    copied: dict[str, list[Path]] = {}
    for split, packages in PHOTOGRAPHS.items():
        copied[split] = []
        (out / split).mkdir(parents=True, exist_ok=True)
        for package, names in packages.items():
            spec = find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                print(f"{package} is not installed: its photographs are left out")
                continue
            for name in names.split():
                files = sorted(Path(spec.submodule_search_locations[0]).rglob(name))
                if not files:
                    print(f"{package} has no {name}: it is left out")
                    continue
                with Image.open(files[0]) as image:
                    target = out / split / f"{package}_{Path(name).stem}.jpg"
                    image.convert("RGB").save(target, quality=95)
                copied[split].append(target)
        print(f"{out / split}: {len(list((out / split).iterdir()))} photographs")
    if collages:
        if not copied["train"]:
            raise typer.BadParameter(
                "there are no photographs to cut: pip install scikit-image", param_hint="--collages"
            )
        _add_collages(out / "train", sorted(copied["train"]), collages)


def _add_collages(folder: Path, files: Sequence[Path], count: int) -> None:
    pictures = []
    for file in files:
        with Image.open(file) as image:
            pictures.append(image.convert("RGB"))
    for number in track(range(count), "Making collages"):
        image = make_collage(pictures, SIDE, Random(number))
        image.save(folder / f"collage_{number:04}.jpg", quality=92)
    for copy in range(1, count // len(files)):
        for file in files:
            shutil.copyfile(file, file.with_stem(f"{file.stem}_{copy}"))


def make_collage(pictures: list[Image.Image], side: int, random: Random) -> Image.Image:
    """Lay 3 to 40 ellipses and polygons, cut out of RGB pictures, over a square piece of one.

    Sizes are drawn as in the dead leaves model of natural images, with many small shapes and few
    large ones, and every piece gets its own colours. The result has ``side`` pixels a side.
    """
    collage = _cut_piece(pictures, side, random)
    for _ in range(random.randint(3, 40)):
        diameter = max(16, int(side * min(0.9, 0.06 / random.uniform(0.06, 1.0))))
        left, top = (random.randint(-diameter // 2, side - diameter // 2) for _ in "xy")
        piece = _cut_piece(pictures, diameter, random)
        collage.paste(piece, (left, top), _draw_shape(diameter, random))
    return collage


def _cut_piece(pictures: list[Image.Image], side: int, random: Random) -> Image.Image:
    picture = random.choice(pictures)
    extent = int(min(picture.size) * random.uniform(0.15, 1.0))
    left, top = (random.randint(0, length - extent) for length in picture.size)
    piece = picture.crop((left, top, left + extent, top + extent))
    piece = piece.resize((side, side), Image.Resampling.BICUBIC).rotate(90 * random.randint(0, 3))
    if random.random() < 0.5:
        piece = ImageOps.mirror(piece)
    if random.random() < 0.5:
        shift = random.randint(0, 255)
        hue, saturation, value = piece.convert("HSV").split()
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        piece = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    piece = ImageEnhance.Brightness(piece).enhance(random.uniform(0.5, 1.5))
    return ImageEnhance.Color(piece).enhance(random.uniform(0.3, 1.6))


def _draw_shape(side: int, random: Random) -> Image.Image:
    # Drawn twice as large and made smaller, which smooths the outline.
    shape = Image.new("L", (2 * side, 2 * side))
    draw = ImageDraw.Draw(shape)
    if random.random() < 0.4:
        width, height = (side * random.uniform(0.4, 1.0) for _ in "xy")
        draw.ellipse((side - width, side - height, side + width, side + height), fill=255)
    else:
        corners = random.randint(3, 9)
        angles = [2 * math.pi * corner / corners for corner in range(corners)]
        radii = [side * random.uniform(0.3, 1.0) for _ in angles]
        draw.polygon(
            [
                (side + radius * math.cos(angle), side + radius * math.sin(angle))
                for angle, radius in zip(angles, radii, strict=True)
            ],
            fill=255,
        )
    return shape.resize((side, side), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    typer.run(collect)
