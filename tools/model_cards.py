"""The page of model cards, one per paper; `python -m linsight.tools.zoo` writes it."""

from linsight.backbones.registry import Model, Paper, Weights
from linsight.tools.families import (
    family_name,
    is_ours,
    models_by_paper,
    published_top1,
    span,
)

START = """\
# Model cards

Written by `python -m linsight.tools.zoo`; do not edit it. One card a paper; the
[zoo table](zoo.md) has every model's size, figures and weights.

- **Use**: classification of photographs into ImageNet's 1,000 classes, and a start for training on
  other images, classes and tasks. Measure on data of your own before you rely on a result.
- **Not for**: identifying people, or decisions on which somebody's safety or rights depend: nobody
  has examined these models for that.
- **Data**: ImageNet holds photographs from the web, mostly of North America and Europe, and its
  [terms](https://www.image-net.org/download.php) are for non-commercial research. Which weights
  saw ImageNet-1K alone, and which ImageNet-22K before, is in the card.
- **Results** are the papers' and their repositories'; we have not trained these models ourselves.
  top-1: ImageNet-1K at 224 px. AP: COCO val2017, Mask R-CNN 1x. mIoU: ADE20K, UPerNet.
- **Licence** is that of the repository that releases the weights. The code of linsight is under
  Apache-2.0, which covers no weights; linsight keeps none.
- `*_nano` models are ours, for demonstrations and tests, and have no weights.
- `*_linear` models are ours: those of the paper with its linear attention in all stages, where the
  authors keep softmax in some. Nobody has published results or weights of them; their weights have
  the shapes of the paper's, which load as a start for training.
"""

# Training data by a word of a tag, as in timm's tags.
DATA = {
    "in22k": "ImageNet-22K",
    "in1k": "ImageNet-1K",
    "lvd142m": "LVD-142M without labels",
    "lvd1689m": "LVD-1689M without labels",
    "sat493m": "SAT-493M, satellite images, without labels",
}


def page() -> str:
    """The page, in Markdown."""
    return START + "".join(card(paper, models) for paper, models in models_by_paper().items())


def card(paper: Paper, models: dict[str, Model]) -> str:
    """The card of a paper, in Markdown.

    Args:
        paper: the paper.
        models: the rows of its models in the zoo, by name.
    """
    families = dict.fromkeys(map(family_name, models))
    repository = paper.origin.removeprefix("https://github.com/")
    retrained = f"- **Trained anew by others**: {paper.retrained}\n" if paper.retrained else ""
    return f"""
## {paper.name}: {", ".join(f"`{family}_*`" for family in families)}

- **Paper**: [{paper.title}](https://arxiv.org/abs/{paper.arxiv})
- **Code**: [{repository}]({paper.origin})
- **Computes**: {paper.computes}
- **Limits**: {paper.limits}
- **Published results**: {_results(models)}
{retrained}- **Weights, trained on**: {_weights(models)}
- **Licence of the weights**: {paper.license or "not stated by the authors: ask them"}
"""


def _results(models: dict[str, Model]) -> str:
    boxes_and_masks = [model.mask_rcnn for model in models.values() if model.mask_rcnn]
    ranges = (
        ("top-1", published_top1(models)),
        ("box AP", [box for box, _ in boxes_and_masks]),
        ("mask AP", [mask for _, mask in boxes_and_masks]),
        ("mIoU", [model.upernet for model in models.values() if model.upernet]),
    )
    return ", ".join(f"{metric} {span(values)}" for metric, values in ranges if values) or "none"


def _weights(models: dict[str, Model]) -> str:
    tags = {tag: weights for model in models.values() for tag, weights in model.released.items()}
    texts = [f"`{tag}` {_data(tag, weights)}" for tag, weights in tags.items()]
    none = [
        f"`{name}`" for name, model in models.items() if not model.released and not is_ours(name)
    ]
    return "; ".join([*texts, *([f"none released for {', '.join(none)}"] if none else [])])


def _data(tag: str, weights: Weights) -> str:
    names = ", then ".join(DATA[word] for word in tag.split("_") if word in DATA)
    side = weights.config.get("input_size", (3, 224, 224))[-1]
    return names + (f" at {side} px" if side != 224 else "")
