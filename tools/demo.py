"""The demonstrations: `linsight demo` learns handwritten digits and suggests what to do next."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from linsight.tools.train import train


@dataclass(frozen=True)
class Demo:
    """A config to train, and commands to suggest after the training."""

    config: str
    next: tuple[str, ...]


DEMOS = {
    "classification": Demo(
        "rala_vit_nano_digits",
        (
            "linsight export {best} --out exports/digits",
            "linsight predict exports/digits PICTURE...",
            "linsight models",
            "linsight train rala_vit_tiny_300e_in1k --cfg-options data_root=/path/to/imagenet",
        ),
    ),
    "detection": Demo(
        "mask_rcnn_rala_vit_nano_fpn_digits",
        (
            "linsight predict {best} PICTURE_OR_VIDEO...",
            "linsight test mask_rcnn_rala_vit_nano_fpn_digits {best}",
            "linsight train mask_rcnn_rala_vit_tiny_fpn_1x_coco "
            "--cfg-options data_root=/path/to/coco",
        ),
    ),
    "segmentation": Demo(
        "segformer_rala_vit_nano_digits",
        (
            "linsight predict {best} PICTURE...",
            "linsight test segformer_rala_vit_nano_digits {best}",
            "linsight train upernet_rala_vit_small_160k_ade20k "
            "--cfg-options data_root=/path/to/ADEChallengeData2016",
        ),
    ),
}


def demo(
    task: Annotated[
        Literal["classification", "detection", "segmentation"],
        typer.Argument(help="What to learn of the digits."),
    ] = "classification",
    work_dir: Annotated[
        Path | None, typer.Option(help="Where the results go; default: work_dirs/demo_<task>.")
    ] = None,
) -> None:
    """Train a rank-augmented linear-attention model on digit scenes, in minutes."""
    work_dir = work_dir or Path("work_dirs", f"demo_{task}")
    # The curve is drawn when the training has come to its end.
    stopped = (work_dir / "last_checkpoint").is_file()
    stopped = stopped and not (work_dir / "learning_curve.png").is_file()
    if stopped:
        print(f"Going on with the training in {work_dir}, which was stopped.")
    train(DEMOS[task].config, work_dir=work_dir, resume=stopped)
    best = max(work_dir.glob("best_*.pth"), key=lambda path: path.stat().st_mtime)
    print(
        f"""
Done. The test digits are in nobody's handwriting that the model saw.
  weights   {best}
  figures   {work_dir}/learning_curve.png, {work_dir}/predictions.png

What next?"""
    )
    for command in DEMOS[task].next:
        print(f"  {command.format(best=best)}")
