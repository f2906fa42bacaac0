"""linsight: vision backbones with linear attention.

Importing the package registers every model in timm, and does nothing else::

    import timm, linsight
    model = timm.create_model("rala_vit_small")
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# By their full names, which type checkers find in a checkout.
from linsight.backbones.graphs import capture_inference as capture_inference
from linsight.backbones.graphs import capture_training as capture_training
from linsight.backbones.graphs import release_graphs as release_graphs

from . import backbones as backbones

if TYPE_CHECKING:
    from linsight.tools.load import LoadedModel


def train(**options: Any) -> Path:
    """Train a model for a folder or a file of a user's data, as ``linsight train --data`` does.

    ::

        best = linsight.train(data="pictures", model="rala_vit_tiny", epochs=20)

    Args:
        **options: the options of the command by their names, such as ``data``, ``model``,
            ``weights``, ``epochs``, ``batch_size``, ``lr``, ``image_size``, ``work_dir``; or
            ``config``, the name or the path of a config.

    Returns:
        The checkpoint that validated best.

    Raises:
        ValueError: an option, the data or the config is wrong.
        TypeError: there is no such option.
    """
    from linsight.tools.train import run

    return run(**options)


def load(
    source: str | Path,
    model_name: str | None = None,
    device: str | None = None,
    score: float = 0.3,
) -> LoadedModel:
    """Open a trained model of any task, whose ``predict`` takes pictures.

    ::

        linsight.load("best.pth").predict("picture.jpg").name

    Args:
        source: a checkpoint of `linsight train`, a folder of `linsight export`, or the name of a
            model with published weights.
        model_name: timm's name of the model, or the name of a config, where the file does not
            name it.
        device: such as ``"cpu"``; by default a GPU if there is one.
        score: lowest score of the objects that a detector reports.

    Raises:
        FileNotFoundError: `source` is neither a file nor the name of a model.
        CheckpointError: the file is damaged, or holds something else.
    """
    from linsight.tools.load import LoadedModel

    return LoadedModel(source, model_name, device, score)


def linearise(
    model: Any,
    mixer: str = "mala",
    *,
    blocks: Iterable[int] | None = None,
    mixer_options: dict | None = None,
    **options: Any,
) -> Any:
    """A pretrained vision transformer with linear attention in the place of its softmax attention.

    ::

        student = linsight.linearise(teacher, "mala", data="pictures", epochs=20)

    Args:
        model: a ViT, DeiT, DINOv2, DINOv3 or Swin of timm or of linsight, with its weights.
        mixer: name of the new token mixer.
        blocks: indices of the blocks that get it, negative ones from the end; None for all.
        mixer_options: keyword arguments by mixer.
        **options: of :func:`linsight.tools.linearise.train_student`: ``data``, a folder of
            pictures, or ``config`` have the student trained; without them it is as swapped.

    Returns:
        The student, a model of timm, in evaluation mode. Its ``model_args`` are the arguments
        with which :func:`timm.create_model` builds it.

    Raises:
        ValueError: the model is not supported, or an option is wrong.
    """
    if not options:
        from linsight.backbones.linearise import swap_mixers

        return swap_mixers(model, mixer, blocks, mixer_options)
    from linsight.tools.linearise import train_student

    return train_student(model, mixer, blocks, mixer_options, **options)


__version__ = "0.1.0"
