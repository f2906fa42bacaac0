"""The demonstration: `linsight demo` learns handwritten digits and says what to do next."""

from pathlib import Path
from typing import Annotated

import typer

from linsight.tools.train import train

CONFIG = "rala_vit_nano_digits"


def demo(
    work_dir: Annotated[Path, typer.Option(help="Where the results go.")] = Path("work_dirs/demo"),
) -> None:
    """Train a rank-augmented linear-attention model on digit scenes, in minutes."""
    train(CONFIG, work_dir=work_dir)
    best = max(work_dir.glob("best_*.pth"), key=lambda path: path.stat().st_mtime)
    print(
        f"""
Done. The test digits are in nobody's handwriting that the model saw.
  weights   {best}
  figures   {work_dir}/learning_curve.png, {work_dir}/predictions.png

What next?
  linsight export {best} --out exports/digits
  linsight predict exports/digits PICTURE...
  linsight models
  linsight train rala_vit_tiny_300e_in1k --cfg-options data_root=/path/to/imagenet
"""
    )
