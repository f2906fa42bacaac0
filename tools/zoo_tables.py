"""The tables of docs/models.md and docs/weights.md; `python -m linsight.tools.zoo` writes them."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from linsight.backbones.registry import Weights
from linsight.tools.families import (
    braces,
    families_by_mixer,
    is_all_linear,
    is_demonstration,
    is_ours,
    published_top1,
    span,
)

SUMMARY = """\
| models | how many | M | top-1, published | paper |
| --- | ---: | --- | --- | --- |
"""

HOSTS = """\
| models | host | how |
| --- | --- | --- |
"""


def summary(counts: Mapping[str, tuple[int, int]]) -> str:
    """One row per mixer, in Markdown, and which models are of no paper.

    Args:
        counts: parameters and multiply-adds of each model by its name.
    """
    rows, demonstrations, linear = [SUMMARY], [], []
    for families in families_by_mixer().values():
        everything = {name: row for models in families.values() for name, row in models.items()}
        models = {n: row for n, row in everything.items() if not is_ours(n)}
        demonstrations += [f"`{name}`" for name in everything if is_demonstration(name)]
        linear += [f"`{name}`" for name in everything if is_all_linear(name)]
        papers = dict.fromkeys(row.family.paper for row in models.values())
        cells = (
            f"`{braces(families)}_*`",
            str(len(models)),
            span((counts[name][0] / 1e6 for name in models), 0),
            span(published_top1(models)),
            ", ".join(f"[{paper.name}](https://arxiv.org/abs/{paper.arxiv})" for paper in papers),
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    rows.append(f"\nMade for demonstrations and tests: {', '.join(demonstrations)}.\n")
    rows.append(f"\nOurs, with linear attention in all stages, untrained: {', '.join(linear)}.\n")
    return "".join(rows)


def hosts() -> str:
    """Where the weights of each family are, in Markdown, and which models have none."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    without = []
    for mixer, families in families_by_mixer().items():
        for family, models in families.items():
            for host, how in dict.fromkeys(
                _host(weights) for row in models.values() for weights in row.released.values()
            ):
                rows.setdefault((mixer, host, how), []).append(family)
            bare = [n for n, row in models.items() if not row.released and not is_ours(n)]
            without += [f"`{braces(bare)}`"] if bare else []
    lines = [
        f"| `{braces(families)}_*` | {host} | {how} |\n"
        for (_, host, how), families in rows.items()
    ]
    none = f"\nNobody released weights of {', '.join(without)}.\n" if without else ""
    return HOSTS + "".join(lines) + none


def _host(weights: Weights) -> tuple[str, str]:
    """Where weights are, and how they are had."""
    if weights.hub_id:
        return f"[Hugging Face, {weights.hub_id}]({weights.address})", "`pretrained=True`"
    address = urlsplit(weights.address or "")
    host = address.netloc
    if host == "github.com":
        owner, repository = address.path.split("/")[1:3]
        host = f"[releases of {owner}/{repository}](https://{host}/{owner}/{repository}/releases)"
    return host, "`pretrained=True`" if weights.url else "by hand"
