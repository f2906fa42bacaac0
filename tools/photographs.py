"""Collect the photographs that installed packages ship: `python -m linsight.tools.photographs`.

They are few, but of many kinds, and need no download: enough to see whether a model with linear
attention agrees with its teacher on photographs that it was not trained on.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

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


def collect(
    out: Annotated[Path, typer.Argument(help="Folder, which gets sub-folders train and val.")],
) -> None:
    """Copy the photographs that installed packages ship, as JPEG files, for a first try."""
    for split, packages in PHOTOGRAPHS.items():
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
        print(f"{out / split}: {len(list((out / split).iterdir()))} photographs")


if __name__ == "__main__":
    typer.run(collect)
