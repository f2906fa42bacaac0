"""From softmax to linear attention: a student with other mixers learns its teacher's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import HOOKS, METRICS, MODELS
from timm.data import Mixup
from torch import Tensor, nn

from ..backbones.context import Context
from ..backbones.conversion import convert_timm_model
from ..backbones.linearise import swap_mixers
from .backbone import create_backbone
from .distillation import divergence

STAGES = ("mixers", "features", "logits")


@MODELS.register_module()
class Linearisation(BaseModel):
    """A vision transformer whose softmax attention is replaced, and the teacher that it was.

    Three stages train it, without labels:

    * ``mixers``: each new mixer gets the input of its teacher block's mixer, and learns that one's
      output, all blocks at once; the loss is the mean over blocks of the squared error over the
      squared output (arXiv:2402.04347);
    * ``features``: the last tokens, prefix tokens among them, by 1 - cosine and the squared error
      over the squared output; all weights are trained;
    * ``logits``: the teacher's class probabilities, by the Kullback-Leibler divergence at a
      temperature, besides the features.

    The teacher's weights are in no checkpoint.

    Args:
        teacher: arguments of :func:`~linsight.heads.backbone.create_backbone`.
        mixer: name of the new mixer.
        blocks: indices of the blocks that get it; None for all.
        mixer_options: keyword arguments by mixer.
        stages: the share of the training of each stage, by its name, in order.
        temperature: of the teacher's and the student's class probabilities.
        sizes: sides of square images, of which one is drawn for each batch of the training, which
            is resized to it; None leaves batches as they are. A student that sees several numbers
            of tokens agrees at others as well.
        cutmix: share of the images of the training that get a rectangle of another image of their
            batch (arXiv:1905.04899), so that few pictures make many. Batches must then be even.

    Raises:
        ValueError: if an argument is out of its range, or the teacher has no classifier for
            ``logits``.
    """

    def __init__(
        self,
        teacher: dict,
        mixer: str,
        blocks: Sequence[int] | None = None,
        mixer_options: dict | None = None,
        stages: dict[str, float] | None = None,
        temperature: float = 1.0,
        sizes: Sequence[int] | None = None,
        cutmix: float = 0.0,
        data_preprocessor: dict | nn.Module | None = None,
    ) -> None:
        super().__init__(data_preprocessor or BaseDataPreprocessor())
        self.stages = {k: v for k, v in (stages or {"mixers": 0.5, "features": 0.5}).items() if v}
        if unknown := set(self.stages) - set(STAGES):
            raise ValueError(f"stages has {sorted(unknown)}, expected some of {', '.join(STAGES)}")
        if not self.stages or min(self.stages.values()) < 0:
            raise ValueError(f"stages is {stages}, expected shares of 0 or more, not all of them 0")
        if sizes is not None and not (
            isinstance(sizes, Sequence) and sizes and all(type(s) is int and s > 0 for s in sizes)
        ):
            raise ValueError(f"sizes is {sizes}, expected sides in pixels such as (224, 518)")
        if not 0 <= cutmix <= 1:
            raise ValueError(f"cutmix is {cutmix}, expected 0 to 1")
        model = convert_timm_model(create_backbone(**teacher)).eval().requires_grad_(False)
        if "logits" in self.stages and not model.num_classes:
            raise ValueError("stages has 'logits', but the teacher has no classifier: set it to 0")
        # A list hides the teacher from checkpoints and optimisers.
        self._teacher = [model]
        self.backbone = swap_mixers(model, mixer, blocks, mixer_options)
        self.swapped = [
            i
            for i, (one, other) in enumerate(
                zip(mixers_of(model), mixers_of(self.backbone), strict=True)
            )
            if type(one) is not type(other)
        ]
        self.mixer = mixer
        self.temperature = temperature
        self.sizes = sizes
        # There are no labels: all images are of one class.
        self.cutmix = Mixup(
            mixup_alpha=0.0, cutmix_alpha=1.0, prob=cutmix, mode="elem", num_classes=1
        )
        self.stage = next(iter(self.stages))

    def init_weights(self) -> None:
        """Does nothing: the student has the teacher's weights."""

    def set_progress(self, fraction: float) -> None:
        """Enter the stage that is due when this share of the training is done."""
        total, passed = sum(self.stages.values()), 0.0
        for name, share in self.stages.items():
            passed += share / total
            if fraction < passed or name == list(self.stages)[-1]:
                self.stage = name
                return

    def forward(self, inputs: Tensor, labels: Any = None, mode: str = "tensor") -> Any:
        """Run the student, and its teacher, in one of mmengine's modes.

        Args:
            inputs: normalised images (B, C, H, W).
            labels: are not read.
            mode: ``"tensor"`` returns the student's features, ``"loss"`` a dict with the scalar
                ``loss`` of the stage and, in the first stage, ``error_I`` of each swapped block,
                and ``"predict"`` a dict per image with ``cosine``, the mean over tokens of the
                cosine between the two models' features, ``agree``, whether the likeliest class is
                the same (without pooling, of how many tokens; None without a classifier), and
                ``errors``, one per swapped block.

        Raises:
            ValueError: the mode is unknown, or the batch is odd and `cutmix` is not 0.
        """
        student: Any = self.backbone
        teacher: Any = self._teacher[0]
        if mode == "tensor":
            return student.forward_features(inputs)
        teacher.to(inputs.device)
        if mode == "loss":
            if self.cutmix.mix_prob:
                if len(inputs) % 2:
                    raise ValueError(
                        f"a batch has {len(inputs)} images, and cutmix takes an even number: set "
                        "--batch-size, or model.cutmix=0"
                    )
                classes = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
                inputs, _ = self.cutmix(inputs, classes)
            if self.sizes:
                side = self.sizes[int(torch.randint(len(self.sizes), ()))]
                inputs = F.interpolate(inputs, (side, side), mode="bilinear", antialias=True)
            if self.stage == "mixers":
                errors = self.block_errors(teacher, inputs)[0].mean(1)
                names = [f"error_{i:02d}" for i in self.swapped]
                return {"loss": errors.mean()} | dict(zip(names, errors.detach(), strict=True))
            with torch.no_grad():
                wanted = teacher.forward_features(inputs)
            got = student.forward_features(inputs)
            losses = {"loss_features": _distance(got, wanted)}
            if self.stage == "logits":
                losses["loss_logits"] = divergence(
                    student.forward_head(got), teacher.forward_head(wanted), self.temperature
                )
            return losses
        if mode != "predict":
            raise ValueError(f"mode must be 'tensor', 'predict' or 'loss', got {mode!r}")
        errors, wanted = self.block_errors(teacher, inputs)
        got = student.forward_features(inputs)
        cosines = F.cosine_similarity(got.float(), wanted.float(), dim=-1).flatten(1).mean(1)
        agree: list[Any] = [None] * len(inputs)
        if student.num_classes:
            classes = [m.forward_head(f) for m, f in ((student, got), (teacher, wanted))]
            same = classes[0].argmax(-1) == classes[1].argmax(-1)
            agree = same.float().reshape(len(inputs), -1).mean(1).tolist()
        return [
            {"cosine": cosine, "agree": same, "errors": error}
            for cosine, same, error in zip(cosines.tolist(), agree, errors.T.tolist(), strict=True)
        ]

    def block_errors(self, teacher: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The relative squared error (swapped blocks, B) of each new mixer on its teacher block's
        input, and the teacher's features."""
        kept: dict[int, tuple[Tensor, Context, Tensor]] = {}

        def keep(index: int) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, Context], output: Tensor) -> None:
                x, context = args
                # The block resets the stream after the mixer.
                kept[index] = x, replace(context), output

            return hook

        originals, mixers = mixers_of(teacher), mixers_of(self.backbone)
        handles = [originals[i].register_forward_hook(keep(i)) for i in self.swapped]
        try:
            with torch.no_grad():
                features = teacher.forward_features(inputs)
        finally:
            for handle in handles:
                handle.remove()
        errors = []
        for i in self.swapped:
            x, context, wanted = kept[i]
            errors.append(relative_error(mixers[i](x, context), wanted))
        return torch.stack(errors), features


def mixers_of(model: Any) -> list[Any]:
    """The token mixers of all blocks, in order."""
    return [blocks[i].mixer for blocks, i in model.block_places()]


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """The squared error of tokens (B, N, C), or a map (B, H, W, C), over their squared length, for
    each image (B,)."""
    got, wanted = got.float().flatten(1), wanted.float().flatten(1)
    return (got - wanted).square().sum(1) / wanted.square().sum(1).clamp(min=1e-12)


def _distance(got: Tensor, wanted: Tensor) -> Tensor:
    cosine = F.cosine_similarity(got.float(), wanted.float(), dim=-1)
    return (1 - cosine).mean() + relative_error(got, wanted).mean()


@HOOKS.register_module()
class LinearisationStageHook(Hook):
    """Tell a :class:`Linearisation` before each iteration how much of the training is done.

    A checkpoint remembers the student's mixer and blocks, and no other student goes on from it.
    """

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _student_of(runner).set_progress(runner.iter / runner.max_iters)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        model = _student_of(runner)
        checkpoint["meta"]["student"] = {"mixer": model.mixer, "blocks": model.swapped}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        model = _student_of(runner)
        wanted = {"mixer": model.mixer, "blocks": model.swapped}
        found = checkpoint.get("meta", {}).get("student", wanted)
        if found != wanted:
            raise ValueError(
                f"the checkpoint is of a student with {found['mixer']} in blocks {found['blocks']},"
                f" and this one has {model.mixer} in {model.swapped}: give those, or another "
                "--work-dir"
            )


def _student_of(runner: Any) -> Linearisation:
    return getattr(runner.model, "module", runner.model)


@METRICS.register_module()
class Agreement(BaseMetric):
    """How well a :class:`Linearisation` agrees with its teacher.

    ``cosine`` is the mean over tokens of the cosine between the features, ``top1`` the share of
    images with the same likeliest class, where there are classes, both in percent; ``error_I`` is
    the relative squared error of the mixer of block I on its teacher's input.
    """

    default_prefix = "agreement"

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        metrics = {"cosine": 100 * mean([r["cosine"] for r in results])}
        if results[0]["agree"] is not None:
            metrics["top1"] = 100 * mean([r["agree"] for r in results])
        count = len(results[0]["errors"])
        errors = {f"error_{i}": mean([r["errors"][i] for r in results]) for i in range(count)}
        return metrics | errors


@HOOKS.register_module()
class BlockErrorsHook(Hook):
    """Draw the error of each new mixer over the training: block_errors.png in the work dir."""

    priority = "LOW"

    def after_train(self, runner: Any) -> None:
        scalars = runner.message_hub.log_scalars
        names = sorted(name for name in scalars if name.startswith("train/error_"))
        if not names or not is_main_process():
            return
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for rank, name in enumerate(names):
            values, _ = scalars[name].data
            # Blocks are ordered, and so are their shades.
            colour = str(0.8 * rank / len(names))
            axes.plot(values, color=colour, linewidth=1, label=name.rpartition("_")[2])
        axes.set(yscale="log", xlabel="iteration", ylabel="relative squared error of the mixer")
        axes.legend(title="block", ncols=2, fontsize="small", frameon=False)
        figure.savefig(Path(runner.work_dir, "block_errors.png"), dpi=120)
