"""Knowledge distillation of classifiers, as DeiT has it (section 4 of arXiv:2012.12877)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import create_backbone

Kind = Literal["soft", "hard"]


class Distillation:
    """The loss of a student on its teacher's logits.

    soft: t^2 KL(softmax(z_teacher / t) || softmax(z / t)); hard: the cross-entropy with the
    teacher's likeliest class. The teacher sees the student's images, as they are normalised and
    mixed. Its weights are in no checkpoint.

    Args:
        teacher: arguments of :func:`~linsight.heads.backbone.create_backbone`.
        num_classes: number of classes of the student.
        kind: ``"soft"`` or ``"hard"``.
        weight: share of this loss; the rest is that of the loss on labels.
        temperature: t, of the soft form alone.

    Raises:
        ValueError: if an argument is out of its range, or the teacher has other classes.
    """

    def __init__(
        self,
        teacher: dict,
        num_classes: int,
        kind: Kind = "soft",
        weight: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"distillation.kind is {kind!r}, expected 'soft' or 'hard'")
        if not 0 <= weight <= 1:
            raise ValueError(f"distillation.weight is {weight}, expected 0 to 1")
        if temperature <= 0:
            raise ValueError(f"distillation.temperature is {temperature}, expected above 0")
        self.teacher = create_backbone(**teacher).eval().requires_grad_(False)
        if self.teacher.num_classes != num_classes:
            raise ValueError(
                f"the teacher has {self.teacher.num_classes} classes and the model {num_classes}: "
                "take a teacher that was trained on the same classes"
            )
        self.kind = kind
        self.weight = weight
        self.temperature = temperature

    def __call__(self, logits: Tensor, inputs: Tensor) -> Tensor:
        """The mean loss of the student's logits (B, num_classes) for images (B, C, H, W).

        Raises:
            ValueError: the teacher's logits have another shape.
        """
        with torch.no_grad():
            wanted: Any = self.teacher.to(inputs.device)(inputs).float()
        if wanted.shape != logits.shape:
            raise ValueError(
                f"the teacher's logits have shape {tuple(wanted.shape)}, and the model's "
                f"{tuple(logits.shape)}: take a teacher that pools its tokens"
            )
        if self.kind == "hard":
            return F.cross_entropy(logits, wanted.argmax(-1))
        return divergence(logits, wanted, self.temperature)


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """t^2 KL(softmax(wanted / t) || softmax(logits / t)), averaged over images."""
    logits, wanted = ((x.float() / temperature).log_softmax(-1) for x in (logits, wanted))
    return F.kl_div(logits, wanted, reduction="batchmean", log_target=True) * temperature**2
