"""How a row of the zoo becomes a model of timm."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


@dataclass(frozen=True)
class Weights:
    """Where pretrained weights are: in a repository of the Hugging Face hub, at an address, or
    behind a page that a person must open. Weights behind a page are loaded from a file. Nobody has
    released weights that are nowhere: their tag builds what was published.

    Attributes:
        hub_id: 'owner/repository', or None.
        filename: the file's name in that repository.
        url: the address of a file, where there is no repository.
        page: the address of a page to get the file from by hand, where there is neither.
        config: the differences from the family's data configuration (input_size, crop_pct, ...).
        arguments: constructor arguments that these weights need; 'name.tag' builds with them.
    """

    hub_id: str | None = None
    filename: str | None = None
    url: str | None = None
    page: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str | None:
        """Where a person finds them, or None if nobody has released them."""
        return f"https://huggingface.co/{self.hub_id}" if self.hub_id else self.url or self.page


@dataclass(frozen=True)
class Paper:
    """What was published with a mixer, and what a user should know of it.

    Attributes:
        name: what its authors call their models.
        arxiv: number of the paper.
        title: the paper's title.
        authors: the paper's authors in its order, each as 'Family, Given'.
        venue: the conference or journal that published the paper.
        year: the year of that publication.
        origin: address of the authors' code.
        license: the licence of the repository that releases the weights, by its SPDX name in
            lower case as timm has it, or None where it states none.
        computes: what the models compute, in a line.
        limits: where they are the wrong choice, in a line.
        journal: whether the venue is a journal.
        retrained: what others have reported of a training of their own, and who; empty if nothing
            is known.
    """

    name: str
    arxiv: str
    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    origin: str
    license: str | None
    computes: str
    limits: str
    journal: bool = False
    retrained: str = ""


@dataclass(frozen=True)
class Family:
    """What the models of one paper on one skeleton share.

    Attributes:
        skeleton: the model class.
        filter_fn: timm's checkpoint filter for the authors' files.
        paper: the paper of the mixer.
        first_conv, classifier: names of the layers that timm adapts to other channels and classes;
            a model with a classifier for distillation has two.
        config: constructor arguments that all sizes share.
        data: the differences from timm's usual data configuration (crop_pct, ...).
        out_indices: which maps `features_only` gives by default; an integer n means the last n.
    """

    skeleton: type[nn.Module]
    filter_fn: Callable
    paper: Paper
    first_conv: str
    classifier: str | tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    out_indices: int | tuple[int, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Model:
    """One row of the zoo.

    Attributes:
        family: what it shares with the other models of the paper on this skeleton.
        config: constructor arguments of this size.
        weights: pretrained tags, best first.
        parameters: how many parameters the authors' own model has with 1,000 classes, at the
            image size of the first released weights, or None where nobody has counted them.
        top1: published top-1 accuracy on ImageNet-1K in percent, or None.
        top1_size: side in pixels of the images that it was measured on.
        mask_rcnn: published box and mask AP on COCO val2017 with Mask R-CNN, schedule 1x, or None.
        upernet: published mIoU on ADE20K in percent with UperNet, 160,000 iterations of 512 x 512
            crops, tested at one scale, or None.
    """

    family: Family
    config: dict[str, Any]
    weights: dict[str, Weights] = field(default_factory=dict)
    parameters: int | None = None
    top1: float | None = None
    top1_size: int = 224
    mask_rcnn: tuple[float, float] | None = None
    upernet: float | None = None

    @property
    def released(self) -> dict[str, Weights]:
        """The weights that somebody has released."""
        return {tag: weights for tag, weights in self.weights.items() if weights.address}


ZOO: dict[str, Model] = {}


def _default_cfgs(name: str, model: Model) -> dict[str, dict[str, Any]]:
    family = model.family
    common = {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": family.first_conv,
        "classifier": family.classifier,
        "paper_ids": f"arXiv:{family.paper.arxiv}",
        "origin_url": family.paper.origin,
        "license": family.paper.license,
    } | family.data
    # timm takes the first tag as the default.
    plain = {} if any(w.hub_id or w.url for w in model.weights.values()) else {name: common}
    return plain | {
        f"{name}.{tag}": common
        | {
            "hf_hub_id": weights.hub_id,
            "hf_hub_filename": weights.filename,
            "url": weights.url or "",
        }
        | weights.config
        for tag, weights in model.weights.items()
    }


def register(module: str, rows: dict[str, Model]) -> None:
    """Register every row in timm, under `module`, and in `ZOO`.

    Args:
        module: the name of the module that timm lists the models under.
        rows: models by their timm names.
    """
    configs = {}
    for name, model in rows.items():
        configs |= _default_cfgs(name, model)
    vars(sys.modules[module])["default_cfgs"] = generate_default_cfgs(configs)
    for name, model in rows.items():
        register_model(_entrypoint(module, name, model))
    ZOO.update(rows)


def _merged(*configs: dict[str, Any]) -> dict[str, Any]:
    """Later arguments replace earlier ones; in `mixer_options`, later options do."""
    merged = {name: value for config in configs for name, value in config.items()}
    options: dict[str, dict[str, Any]] = {}
    for config in configs:
        for mixer, chosen in (config.get("mixer_options") or {}).items():
            options[mixer] = options.get(mixer, {}) | dict(chosen)
    return merged | ({"mixer_options": options} if options else {})


# Arguments that say where weights come from, or that wrap the model.
_NOT_OF_THE_MODEL = ("pretrained", "features_only", "out_indices", "cache_dir", "scriptable")


def _remembered(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if not k.startswith(_NOT_OF_THE_MODEL)}


def _entrypoint(module: str, name: str, model: Model) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        tagged = model.weights.get(str(kwargs.get("pretrained_cfg")), Weights())
        with nullcontext() if device is None else torch.device(device):
            built: Any = build_model_with_cfg(
                model.family.skeleton,
                name,
                pretrained,
                pretrained_filter_fn=model.family.filter_fn,
                feature_cfg={
                    "out_indices": model.family.out_indices,
                    "feature_cls": "getter",
                },
                **_merged(model.family.config, model.config, tagged.arguments, kwargs),
            )
        # What `timm.create_model` needs beside the name to build the same model again.
        built.model_args = _remembered(tagged.arguments | kwargs)
        built.filter_fn = model.family.filter_fn
        return built.to(dtype=dtype)

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"{name}: see `linsight.backbones.registry.ZOO[{name!r}]`."
    return create
