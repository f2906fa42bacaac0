"""Names and figures of the zoo's families, as its pages print them."""

from collections.abc import Iterable, Mapping

from linsight.backbones import ZOO
from linsight.backbones.registry import Model, Paper

# The end of the names of models that have linear attention in all stages, where their papers'
# models keep softmax in some.
ALL_LINEAR = "_linear"


def family_name(model: str) -> str:
    """The name of a model without its size, such as 'tiny' or 'small_plus': 'agent_swin' of
    'agent_swin_tiny'."""
    return model.removesuffix(ALL_LINEAR).removesuffix("_plus").rpartition("_")[0]


def mixer_name(family: str) -> str:
    """The name of a family without its skeleton: 'agent' of 'agent_swin'."""
    return family.rpartition("_")[0] or family


def braces(names: Iterable[str]) -> str:
    """Names that differ in their last word alone as one: 'agent_{pvt,swin}'."""
    prefix, words = "", []
    for name in names:
        start, mark, word = name.rpartition("_")
        prefix = start + mark
        if word not in words:
            words.append(word)
    return prefix + (words[0] if len(words) == 1 else f"{{{','.join(words)}}}")


def is_demonstration(model: str) -> bool:
    """Whether a model is of no paper, but made for demonstrations and tests."""
    return model.endswith("_nano")


def is_all_linear(model: str) -> bool:
    """Whether a model is of no paper, but a paper's with its linear attention in all stages."""
    return model.endswith(ALL_LINEAR)


def is_ours(model: str) -> bool:
    """Whether a model is of no paper, so that nobody has published results or weights of it."""
    return is_demonstration(model) or is_all_linear(model)


def models_by_paper() -> dict[Paper, dict[str, Model]]:
    """The rows of each paper by their names; the papers in the order of what they are called."""
    papers: dict[Paper, dict[str, Model]] = {}
    for name, model in ZOO.items():
        papers.setdefault(model.family.paper, {})[name] = model
    return {paper: papers[paper] for paper in sorted(papers, key=lambda p: p.name.lower())}


def families_by_mixer() -> dict[str, dict[str, dict[str, Model]]]:
    """The rows of each family, by the names of mixers, families and models."""
    mixers: dict[str, dict[str, dict[str, Model]]] = {}
    for name, model in ZOO.items():
        family = family_name(name)
        mixers.setdefault(mixer_name(family), {}).setdefault(family, {})[name] = model
    return mixers


def published_top1(models: Mapping[str, Model]) -> list[float]:
    """The published accuracies for images of 224 px, those that compare."""
    return [row.top1 for row in models.values() if row.top1 is not None and row.top1_size == 224]


def span(values: Iterable[float], digits: int = 1) -> str:
    """The least and the greatest of some values, '74.9 to 84.7'; '-' for none."""
    texts = [f"{value:.{digits}f}" for value in sorted(values)]
    if not texts:
        return "-"
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"
