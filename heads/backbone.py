"""Any timm model as the backbone of a classifier, segmentor or detector that mmengine builds."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from linsight.backbones import ZOO
from linsight.backbones.checkpoint import CheckpointError, TimmModel
from linsight.backbones.graphs import is_recording
from linsight.backbones.initialization import shapes_only
from linsight.backbones.norms import BATCH_NORMS, PRepBN

from .checkpoint import read_checkpoint
from .published import require_weights

ATTENTION_OF_ANY_SIZE = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def create_backbone(
    model_name: str,
    checkpoint: str | Path | None = None,
    frozen_stages: int = -1,
    **kwargs: Any,
) -> TimmModel:
    """:func:`timm.create_model`, with errors that name the nearest model or argument.

    Args:
        model_name: name for :func:`timm.create_model`.
        checkpoint: file of initial weights, in any form that timm or the model's authors release.
            For weights that timm fetches pass ``pretrained=True`` instead.
        frozen_stages: as for :func:`freeze_stages`; -1 freezes nothing.
        **kwargs: further arguments of :func:`timm.create_model`, such as ``drop_path_rate``.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: timm has no model of this name, the model does not take an argument, or it has
            fewer stages than are to be frozen.
        CheckpointError: ``pretrained`` weights cannot be fetched, or the checkpoint is damaged,
            holds code or no weights, or is of another model.
    """
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(f"checkpoint: there is no file {str(checkpoint)!r}")
        overlay = {"state_dict": dict(read_checkpoint(checkpoint)["state_dict"])}
        kwargs = {**kwargs, "pretrained": True, "pretrained_cfg_overlay": overlay}
    architecture = model_name.split(".")[0]
    if ":" not in model_name and not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(
            f"model_name: timm has no model {model_name!r}"
            + (f"; the nearest are {', '.join(nearest)}" if nearest else "")
        )
    if kwargs.get("pretrained") and not kwargs.get("pretrained_cfg_overlay"):
        require_weights(model_name)
    try:
        model = cast(TimmModel, timm.create_model(model_name, **kwargs))
        if checkpoint is not None:
            model.pretrained_cfg.pop("state_dict")
        if frozen_stages >= 0:
            freeze_stages(model, frozen_stages)
        return model
    except RuntimeError as error:
        if "No pretrained weights exist" not in str(error):
            raise
        raise CheckpointError(
            f"{model_name} has no weights at a plain address; {_weights_source(architecture)}"
        ) from None
    except OSError as error:
        if not kwargs.get("pretrained") or "pretrained_cfg_overlay" in kwargs:
            raise
        raise CheckpointError(
            f"the weights of {model_name} could not be fetched ({error}); "
            f"{_weights_source(architecture)}"
        ) from None
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in kwargs:
            raise
        # timm's entry function hides the class, which only a built model reveals.
        with shapes_only():
            accepted = inspect.signature(type(timm.create_model(model_name)).__init__).parameters
        nearest = difflib.get_close_matches(unknown[1], accepted, n=3, cutoff=0.5)
        raise ValueError(
            f"backbone: {model_name} takes no argument {unknown[1]!r}; "
            f"the nearest are {', '.join(nearest or sorted(set(accepted) - {'self'}))}"
        ) from None


def _weights_source(architecture: str) -> str:
    """Where to get a model's weights by hand, and how to name the file in a config."""
    weights = ZOO[architecture].released.values() if architecture in ZOO else ()
    places = [str(w.address) for w in weights]
    return (
        f"get them from {' or '.join(places)}: " if places else ""
    ) + "set model.backbone.pretrained=False, and give a file as model.backbone.checkpoint=FILE"


# Names of the norms on the outputs of a backbone in the authors' checkpoints.
_OUTPUT_NORMS = r"(?:extra_norms\.|norm)(\d)(?:\.norm)?\.(weight|bias)"


def convert_model(state_dict: Mapping[str, Tensor], model: TimmModel) -> dict[str, Tensor]:
    """The weights of a timm model, with the names of its paper's authors converted.

    Raises:
        CheckpointError: the weights are those of another model.
    """
    architecture = model.pretrained_cfg["architecture"]
    if architecture not in ZOO:
        return dict(state_dict)
    try:
        return dict(ZOO[architecture].family.filter_fn(state_dict, model))
    except KeyError as error:
        raise CheckpointError(f"the weights of {architecture} lack {error}") from error


def convert_backbone(state_dict: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The weights of a detector or segmentor, with the authors' names in its backbone converted.

    Their heads and necks have mmdet's and mmsegmentation's names, and so have ours. The weights of
    the backbone go through the filter function of its family, and the norms on its outputs
    (``extra_norms.0.norm.weight`` of RAVLT and MAViT, ``norm0.weight`` of Swin) become
    ``backbone.norms.0.weight``.

    Args:
        state_dict: the weights, of which the backbone's begin with ``backbone.``; those that
            linsight has saved stay as they are.
        backbone: the backbone that is to load them; for another than a `TimmBackbone` all names
            stay as they are.

    Raises:
        CheckpointError: the backbone's weights are those of another model.
    """
    ours = any(name.startswith("backbone.model.") for name in state_dict)
    theirs = any(name.startswith("backbone.") for name in state_dict)
    if ours or not theirs or not isinstance(backbone, TimmBackbone):
        return dict(state_dict)
    inner, renamed = {}, {}
    for name, value in state_dict.items():
        part, _, rest = name.partition(".")
        norm = re.fullmatch(_OUTPUT_NORMS, rest)
        if part != "backbone":
            renamed[name] = value
        elif norm is None:
            inner[rest] = value
        elif int(norm[1]) in backbone.out_indices:
            place = backbone.out_indices.index(int(norm[1]))
            renamed[f"backbone.norms.{place}.{norm[2]}"] = value
    converted = convert_model(inner, backbone.model)
    return {**{f"backbone.model.{k}": v for k, v in converted.items()}, **renamed}


def freeze_stages(model: TimmModel, stages: int) -> None:
    """Freeze the stem of a model and its first stages, numbered as for timm's layer decay.

    Args:
        model: the model.
        stages: how many stages; 0 freezes the stem alone. With all stages only the classifier, if
            there is one, is still trained: a linear probe.

    Raises:
        ValueError: the model has fewer stages.
    """
    levels = len(model.feature_info)
    _check_frozen(stages, levels)
    groups: Any = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    classifier = model.get_classifier() if model.num_classes else None
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    trained = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    for name, parameter in model.named_parameters():
        last = stages == levels and model.num_classes and id(parameter) not in trained
        if groups[name] <= stages or last:
            parameter.requires_grad_(False)


def _check_frozen(stages: int, levels: int) -> None:
    if not -1 <= stages <= levels:
        raise ValueError(f"frozen_stages is {stages}, expected -1 to {levels}")


def is_plain(feature_info: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the levels of a model all have one stride, as in a plain vision transformer."""
    return len(feature_info) > 1 and len({level["reduction"] for level in feature_info}) == 1


def keep_frozen(model: nn.Module, norm_eval: bool = False) -> None:
    """Put the frozen modules of a model into evaluation mode, and with `norm_eval` each batch
    normalisation."""
    for module in model.modules():
        parameters = list(module.parameters())
        frozen = parameters and not any(p.requires_grad for p in parameters)
        if frozen or (norm_eval and isinstance(module, BATCH_NORMS)):
            module.eval()


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """The feature maps of a timm model, for mmdet's necks and linsight's heads.

    In a config: ``backbone=dict(type="TimmBackbone", model_name="rala_vit_tiny")``. The class is
    registered in mmengine's root registry, where mmdet looks for types that it does not have.

    Args:
        model_name: name for :func:`timm.create_model`; the model must have
            ``forward_intermediates``.
        out_indices: indices into the model's ``feature_info`` of the levels whose maps are
            returned; in a transformer of four stages the levels are the stages, in a plain one the
            blocks. By default the first four levels, or the last block of a plain transformer, for
            a :class:`~linsight.heads.simple_feature_pyramid.SimpleFeaturePyramid`.
        output_norm_eps: epsilon of a new LayerNorm on each returned map, as the detection code of
            most papers has it. With None the maps have no further norm.
        frozen_stages: freeze the stem and this many stages, and keep them in evaluation mode;
            0 freezes the stem alone, -1 freezes nothing.
        norm_eval: keep every batch normalisation in evaluation mode.
        compile: compile the forward pass; a dict holds arguments of ``torch.compile``.
        with_cp: recompute activations in the backward pass (gradient checkpointing).
        checkpoint: file of initial weights, in any form that timm or the model's authors release.
            For weights that timm fetches pass ``pretrained=True`` instead.
        init_cfg: must be None, since timm initialises the model.
        **kwargs: further arguments of :func:`timm.create_model`, such as ``drop_path_rate``.

    Raises:
        ValueError: an argument is out of its range, or the model cannot return feature maps.
        FileNotFoundError: there is no such checkpoint.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        output_norm_eps: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        compile: bool | dict = False,
        checkpoint: str | Path | None = None,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            raise ValueError(
                f"init_cfg is {init_cfg}, which a TimmBackbone would not read: give a file of "
                "weights as checkpoint=, or pretrained=True"
            )
        model = create_backbone(model_name, checkpoint, num_classes=0, **kwargs)
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(
                f"model_name: {model_name} has no forward_intermediates, so it cannot give maps"
            )
        levels = len(model.feature_info)
        if out_indices is None:
            out_indices = (levels - 1,) if is_plain(model.feature_info) else (0, 1, 2, 3)
        if not out_indices or not all(0 <= i < levels for i in out_indices):
            raise ValueError(
                f"out_indices is {tuple(out_indices)}, but {model_name} has levels 0 to "
                f"{levels - 1}"
            )
        _check_frozen(frozen_stages, levels)
        self.out_indices = sorted(out_indices)
        self.out_channels = [model.feature_info[i]["num_chs"] for i in self.out_indices]
        self.out_strides = [model.feature_info[i]["reduction"] for i in self.out_indices]
        self.norm_eval = norm_eval
        # Layers after the last returned map would get no gradient.
        model.prune_intermediate_layers(self.out_indices, prune_norm=True)
        if norm_eval:
            # The layer norms that have no part in evaluation would stop distributed training.
            for part in model.modules():
                if isinstance(part, PRepBN):
                    part.layer_weight.requires_grad_(False)
                    part.layer_bias.requires_grad_(False)
        self.with_cp = with_cp
        if with_cp:
            model.set_grad_checkpointing(True)
        self.model = model
        if output_norm_eps is None:
            self.norms = nn.ModuleList(nn.Identity() for _ in self.out_indices)
        else:
            self.norms = nn.ModuleList(
                LayerNorm2d(channels, eps=output_norm_eps) for channels in self.out_channels
            )
        if frozen_stages >= 0:
            freeze_stages(model, frozen_stages)
        if compile:
            self.compile(**(compile if isinstance(compile, dict) else {}))

    def init_weights(self) -> None:
        """Does nothing: timm has initialised the model, or loaded its weights, on creation."""

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the mode of the modules that are not frozen; frozen modules stay in evaluation."""
        super().train(mode)
        keep_frozen(self.model, self.norm_eval)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute maps (B, C_i, H_i, W_i), finest first, from images (B, 3, H, W)."""
        with self._choose_attention(x):
            maps = self.model.forward_intermediates(
                x, indices=self.out_indices, output_fmt="NCHW", intermediates_only=True
            )
        return tuple(norm(x) for norm, x in zip(self.norms, maps, strict=True))

    def _choose_attention(self, x: Tensor) -> AbstractContextManager:
        """A context for images of changing sizes, in which cuDNN does not compute attention.

        It builds a program for each size that it has not met, which takes longer than the pass;
        PyTorch's other kernels take any size. A recorded pass has one size. What checkpointing
        computes again it would compute outside of the context, and find other tensors.
        """
        if not x.is_cuda or self.with_cp or torch.compiler.is_compiling() or is_recording():
            return nullcontext()
        return sdpa_kernel(ATTENTION_OF_ANY_SIZE)
