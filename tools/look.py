"""See what a model sees: `linsight look PICTURE --model MODEL`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from linsight.backbones.mixers.projected import PackedAttention, ProjectedMixer
from linsight.backbones.skeletons.base import VisionModel
from linsight.heads.backbone import TimmBackbone
from linsight.tools.config import ConfigError
from linsight.tools.predict import open_picture, open_predictor
from linsight.tools.predict_classification import ClassificationPredictor
from linsight.tools.prediction import Predictor
from linsight.tools.run import report_errors


def look(
    picture: Annotated[Path, typer.Argument(help="A picture.")],
    model: Annotated[
        str,
        typer.Option(
            help="A checkpoint, a training's folder, an exported folder, or a model's name."
        ),
    ],
    model_name: Annotated[
        str | None, typer.Option(help="timm's name, for files that do not name their model.")
    ] = None,
    point: Annotated[
        str, typer.Option(help="Where attention looks from: X,Y as shares of the image.")
    ] = "0.5,0.5",
    label: Annotated[
        str | None, typer.Option(help="A class's name or number; default: the likeliest.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=32, help="Side in pixels; default: the model's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The drawing.")] = Path("look.png"),
) -> None:
    """Draw a model's features as colours, its attention from a point, and a class's map."""
    with report_errors():
        predictor = open_predictor(model, model_name, torch.device("cpu"))
        looker = Looker.of(predictor)
        if looker is None:
            raise ConfigError(f"--model {model} shows no features: give the checkpoint it is of")
        if isinstance(predictor, ClassificationPredictor):
            if image_size is not None:
                settings = timm.data.resolve_model_data_config(predictor.model)
                settings["input_size"] = (settings["input_size"][0], image_size, image_size)
                predictor.transform = timm.data.create_transform(**settings)
        elif label is not None or image_size is not None:
            raise ConfigError(f"--label and --image-size are for classifiers, and {model} is none")
        x = looker.predictor.prepare(open_picture(picture))
        figure = looker.draw(x, _point(point), label)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
        print(f"Drawn: {out}")


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ConfigError(f"--point is {text!r}, expected two shares such as 0.5,0.25")
    return x, y


def _choose(
    model: Any, x: Tensor, names: Sequence[str], label: str | None
) -> tuple[list[float], int | None]:
    """The probabilities of the classes, and the class to look for, None without a classifier."""
    if not model.num_classes:
        return [], None
    with torch.no_grad():
        scores = model(x)[0].float().softmax(-1).tolist()
    if label is None:
        return scores, int(np.argmax(scores))
    if label in names:
        return scores, list(names).index(label)
    if label.isdecimal() and int(label) < len(scores):
        return scores, int(label)
    raise ConfigError(
        f"--label is {label!r}, expected the name of a class or a number below {len(scores)}"
    )


class Attention(NamedTuple):
    """What a token takes of the others, by one block.

    Attributes:
        name: the block.
        weights: (H, W), the mean over heads.
    """

    name: str
    weights: Tensor


@torch.no_grad()
def compute_stages(model: Any, x: Tensor) -> list[Tensor]:
    """The features (C, H, W) of an image (1, C, H, W) at each resolution, in float32.

    Args:
        model: a timm model, or a backbone that gives maps.
        x: the image.
    """
    given = isinstance(model, TimmBackbone)
    maps = model(x) if given else model.forward_intermediates(x, intermediates_only=True)
    last = {tuple(m.shape[-2:]): m[0].float() for m in maps}
    return list(last.values())


def attend_from(model: nn.Module, x: Tensor, point: tuple[float, float]) -> list[Attention]:
    """The effective attention of the token at a point, by the last block of each resolution.

    The result of a mixer for token i, y_i, is linear in the values v_j, whatever attention it is:
    y_i = sum_j A_ij v_j. A_ij is the derivative of y_i by v_j, which autograd gives exactly as the
    model computes it, from its state or from its softmax, gate and local branch included.

    Args:
        model: a model of linsight.
        x: image (1, C, H, W).
        point: (x, y), as shares of the image's width and height.

    Returns:
        One for each resolution whose last block projects values.
    """
    found: dict[tuple[int, int], Attention] = {}
    handles = []
    projected: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        projected[module] = output.detach().requires_grad_()
        return projected[module]

    def differentiate(name: str, mixer: ProjectedMixer) -> Any:
        def hook(attention: Any, args: tuple, y: Tensor) -> Tensor:
            projection, context = projected.pop(mixer.in_proj), args[1]
            height, width = context.size
            prefix = context.prefix_tokens
            column, row = (
                min(int(share * side), side - 1)
                for share, side in zip(point, (width, height), strict=True)
            )
            token = prefix + row * width + column
            # The first channel of each head: the heads' derivatives do not meet.
            first = slice(None, None, attention.head_dim)
            (slope,) = torch.autograd.grad(y[0, token, first].sum(), projection)
            dim = y.shape[-1]
            # Queries and keys come first; where they are one block, the values are the second.
            start = dim * min(2, projection.shape[-1] // dim - 1)
            weights = slope[0, prefix:, start : start + dim][:, first].mean(-1)
            found[context.size] = Attention(name, weights.view(height, width).float())
            return y.detach()

        return hook

    for name, mixer in model.named_modules():
        packed = isinstance(mixer, ProjectedMixer) and isinstance(mixer.attention, PackedAttention)
        if packed and isinstance(mixer, ProjectedMixer):
            handles.append(mixer.in_proj.register_forward_hook(keep))
            where = name.removesuffix(".mixer")
            handles.append(mixer.attention.register_forward_hook(differentiate(where, mixer)))
    try:
        with torch.enable_grad():
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def locate_class(model: Any, x: Tensor, label: int) -> Tensor:
    """Where a class is seen: Grad-CAM (arXiv:1610.02391) of what the last block gets, (H, W).

    Behind the last block a class token has what it takes of the map, so that no derivative by the
    map is left.

    Args:
        model: a classifier of linsight.
        x: image (1, C, H, W).
        label: number of the class.
    """
    kept: list[Tensor] = []
    sizes: list[tuple[int, int]] = []

    def hook(block: nn.Module, args: tuple) -> tuple:
        kept.append(args[0].detach().requires_grad_())
        sizes.append(args[1].size)
        return (kept[0], *args[1:])

    blocks, index = model.block_places()[-1]
    block = blocks[index]
    handle = block.register_forward_pre_hook(hook)
    try:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(model.eval()(x)[0, label], kept[0])
    finally:
        handle.remove()
    height, width = sizes[0]
    # Tokens (N, C), or a map (H, W, C); class tokens are left out.
    values, slope = (
        t[0].detach().flatten(0, -2)[-height * width :].float() for t in (kept[0], slope)
    )
    return (values * slope.mean(0)).sum(-1).relu().view(height, width)


def colour_features(features: Tensor, like: Tensor | None = None) -> np.ndarray:
    """The three principal components of features (C, H, W) as red, green and blue (H, W, 3).

    Args:
        features: of a picture.
        like: features (C, ...) that the components and the range of the colours are taken from, so
            that two models can be compared; None for `features` themselves.
    """
    tokens = features.flatten(1).T.double()
    others = tokens if like is None else like.flatten(1).T.double()
    mean = others.mean(0)
    basis = torch.linalg.svd(others - mean, full_matrices=False)[2][:3].T
    colours = (tokens - mean) @ basis
    low, high = ((others - mean) @ basis).quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - colours.shape[1]))
    return colours.view(*features.shape[1:], 3).numpy()


def as_picture(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image (1, C, H, W) in colours from 0 to 1, float32 (H, W, 3)."""
    centre, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    picture = (x[0].float() * scale + centre).clamp(0, 1)
    return picture.expand(3, -1, -1).permute(1, 2, 0).numpy()


def draw_view(
    model: Any,
    x: Tensor,
    settings: dict,
    names: Sequence[str],
    point: tuple[float, float],
    label: str | None = None,
) -> Figure:
    """Draw a class's map, features and attention as :func:`draw_look` does.

    Args:
        model: a model of linsight or, without a class's map, a backbone that gives maps.
        x: image (1, C, H, W).
        settings: ``mean`` and ``std``, by which the image was normalised.
        names: of the classes.
        point: (x, y), as shares of the image's width and height.
        label: name or number of the class; None for the likeliest.

    Raises:
        ConfigError: there is no such class.
    """
    class_map, title = None, None
    if isinstance(model, VisionModel):
        scores, chosen = _choose(model, x, names, label)
        if chosen is not None:
            class_map = locate_class(model, x, chosen).cpu()
            title = f"{names[chosen]} {scores[chosen]:.1%}"
    stages = [features.cpu() for features in compute_stages(model, x)]
    seen = [Attention(a.name, a.weights.cpu()) for a in attend_from(model, x, point)]
    return draw_look(x.cpu(), settings, stages, seen, point, class_map, title)


def draw_look(
    x: Tensor,
    settings: dict,
    stages: list[Tensor],
    attentions: list[Attention],
    point: tuple[float, float],
    class_map: Tensor | None,
    class_name: str | None,
) -> Figure:
    """The picture and the class's map, then features and attention, a column per resolution."""
    picture = as_picture(x, settings["mean"], settings["std"])
    height, width = picture.shape[:2]
    shown = {tuple(a.weights.shape): a for a in attentions}
    columns = max(2, len(stages))
    figure = Figure(figsize=(2.4 * columns, 7.6), layout="constrained")
    grid = figure.subplots(3, columns, squeeze=False)
    for cell in grid.flat:
        cell.axis("off")
    grid[0, 0].imshow(picture)
    grid[0, 0].plot(point[0] * width, point[1] * height, "r+", markersize=12)
    grid[0, 0].set_title("as the model gets it", fontsize=9)

    def overlay(cell: Any, weights: Tensor, title: str) -> None:
        big = F.interpolate(weights[None, None], (height, width), mode="bilinear")[0, 0]
        most = big.abs().max().clamp(min=1e-12)
        cell.imshow(picture.mean(-1), cmap="gray", alpha=0.6)
        cell.imshow(big / most, cmap="seismic", vmin=-1, vmax=1, alpha=0.6)
        cell.set_title(title, fontsize=9)

    if class_map is not None:
        overlay(grid[0, 1], class_map, f"what says {class_name}")
    for column, features in enumerate(stages):
        size = tuple(features.shape[-2:])
        grid[1, column].imshow(colour_features(features))
        grid[1, column].set_title(f"features {size[0]} × {size[1]}", fontsize=9)
        if size in shown:
            overlay(grid[2, column], shown[size].weights, f"attention\n{shown[size].name}")
            grid[2, column].plot(point[0] * width, point[1] * height, "k+", markersize=10)
    return figure


class Looker:
    """Draws what the model of a predictor sees.

    Of a detector or a segmentor this is its backbone, which has no classes to locate.

    Args:
        predictor: the predictor.
        model: the classifier, or the backbone.
    """

    def __init__(self, predictor: Any, model: nn.Module) -> None:
        self.predictor = predictor
        # Attention and Grad-CAM differentiate by maps alone.
        self.model: Any = model.eval().requires_grad_(False)

    @classmethod
    def of(cls, predictor: Predictor) -> Looker | None:
        """That of a predictor, or None where its model shows no features, such as a file's."""
        whole = getattr(predictor, "model", None)
        model = getattr(whole, "backbone", whole)
        shows = isinstance(model, TimmBackbone) or hasattr(model, "forward_intermediates")
        return cls(predictor, cast(nn.Module, model)) if shows else None

    def show(self, x: Tensor) -> Image.Image:
        """What the model gets, as a picture (RGB)."""
        colours = as_picture(x.cpu(), self.predictor.mean, self.predictor.std)
        return Image.fromarray((255 * colours).round().astype(np.uint8))

    def draw(self, x: Tensor, point: tuple[float, float], label: str | None = None) -> Figure:
        """What :func:`draw_view` draws.

        Args:
            x: image (1, C, H, W).
            point: (x, y), as shares of the image's width and height.
            label: name or number of the class; None for the likeliest.
        """
        settings = {"mean": self.predictor.mean, "std": self.predictor.std}
        return draw_view(self.model, x, settings, self.predictor.names, point, label)
