"""Lay out aerial photographs of trees: `python -m linsight.tools.trees`.

The package deepforest ships four photographs with 951 boxes around trees (MIT licence). They become
a data set in COCO's format with the one class tree: one photograph trains, another one of the same
forest validates, and two of other forests test.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from xml.etree import ElementTree
from zipfile import ZipFile

import typer
from PIL import Image

from linsight.data.loading import DataError
from linsight.data.sources import Sample, image_size, to_coco
from linsight.tools.run import report_errors

SPLITS = {
    "train": ["2019_YELL_2_528000_4978000_image_crop2"],
    "val": ["2019_YELL_2_541000_4977000_image_crop"],
    "test": ["OSBS_029", "SOAP_061"],
}

app = typer.Typer()


@app.command()
def main(
    source: Annotated[
        Path, typer.Argument(help="The wheel of deepforest 2.1.0, or the folder of its data.")
    ],
    folder: Annotated[Path, typer.Argument(help="Gets images/, train.json, val.json, test.json.")],
) -> None:
    """Write the photographs and their boxes in COCO's format."""
    with report_errors(), TemporaryDirectory() as unpacked:
        if source.is_file():
            with ZipFile(source) as wheel:
                wheel.extractall(unpacked)
            source = Path(unpacked, "deepforest", "data")
        images = folder / "images"
        images.mkdir(parents=True, exist_ok=True)
        for split, names in SPLITS.items():
            samples = []
            for name in names:
                if not (source / f"{name}.xml").is_file():
                    raise DataError(f"{source} has no {name}.xml: give the wheel of deepforest")
                # Uncompressed: each crop opens its photograph anew, and a PNG of this size takes a
                # sixth of a second.
                file = images / f"{name}.bmp"
                with Image.open(source / f"{name}.png") as photograph:
                    photograph.save(file)
                samples.append(Sample(file, read_boxes(source / f"{name}.xml"), image_size(file)))
            content = to_coco(["tree"], samples, images)
            (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
            count = len(content["annotations"])
            print(f"{split}: {count} trees in {', '.join(f'{name}.bmp' for name in names)}")


def read_boxes(file: Path) -> list[dict]:
    """The boxes in a file of Pascal VOC's XML, of whatever class, as objects of a `Sample`."""
    objects = []
    for box in ElementTree.parse(file).iter("bndbox"):
        left, top, right, bottom = (
            float(box.findtext(side, "nan")) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        objects.append({"label": 0, "bbox": [left, top, right - left, bottom - top]})
    return objects


if __name__ == "__main__":
    app()
