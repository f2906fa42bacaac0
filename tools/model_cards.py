"""The page of model cards, one per paper; `python -m linsight.tools.zoo` writes it."""

from linsight.backbones import ZOO
from linsight.backbones.registry import Model, Paper

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
"""

# Training data by the end of a tag, as in timm's tags.
DATA = {
    "in22k_ft_in1k": "ImageNet-22K, then ImageNet-1K",
    "in1k": "ImageNet-1K",
    "in1k_2021": "ImageNet-1K",
}


def page() -> str:
    """The page, in Markdown."""
    papers: dict[Paper, dict[str, Model]] = {}
    for name, model in ZOO.items():
        papers.setdefault(model.family.paper, {})[name] = model
    cards = (card(paper, papers[paper]) for paper in sorted(papers, key=lambda p: p.name.lower()))
    return START + "".join(cards)


def card(paper: Paper, models: dict[str, Model]) -> str:
    """The card of a paper, in Markdown.

    Args:
        paper: the paper.
        models: the rows of its models in the zoo, by name.
    """
    families = sorted({name.rpartition("_")[0] for name in models})
    repository = paper.origin.removeprefix("https://github.com/")
    return f"""
## {paper.name}: {", ".join(f"`{family}_*`" for family in families)}

- **Paper**: [{paper.title}](https://arxiv.org/abs/{paper.arxiv})
- **Code**: [{repository}]({paper.origin})
- **Computes**: {paper.computes}
- **Limits**: {paper.limits}
- **Published results**: {_results(list(models.values()))}
- **Weights, trained on**: {_weights(models)}
- **Licence of the weights**: {paper.license or "not stated by the authors: ask them"}
"""


def _results(models: list[Model]) -> str:
    ranges = (
        ("top-1", [model.top1 for model in models]),
        ("box AP", [model.mask_rcnn and model.mask_rcnn[0] for model in models]),
        ("mask AP", [model.mask_rcnn and model.mask_rcnn[1] for model in models]),
        ("mIoU", [model.upernet for model in models]),
    )
    texts = []
    for metric, values in ranges:
        known = [f"{value:.1f}" for value in values if value is not None]
        if known:
            low, high = min(known, key=float), max(known, key=float)
            texts.append(f"{metric} {low}" + (f" to {high}" if high != low else ""))
    return ", ".join(texts)


def _weights(models: dict[str, Model]) -> str:
    tags: dict[str, list[str]] = {}
    for name, model in models.items():
        for tag in model.weights:
            tags.setdefault(tag, []).append(name)
    texts = [f"`{tag}` {DATA[tag.removeprefix('ms_').removeprefix('fb_')]}" for tag in tags]
    none = [
        f"`{name}`"
        for name, model in models.items()
        if not model.weights and not name.endswith("_nano")
    ]
    return "; ".join(texts) + (f"; none released for {', '.join(none)}" if none else "")
