"""The references of CITATION.cff; `python -m linsight.tools.zoo` writes them."""

import json

from linsight.backbones.registry import Paper
from linsight.tools.families import models_by_paper


def references() -> str:
    """The zoo's papers as the list `references` of the Citation File Format 1.2.0, in YAML."""
    # One paper may have two rows of the zoo, such as SLAB and its norms under softmax attention.
    papers = {paper.arxiv: paper for paper in reversed(models_by_paper())}
    return "".join(map(_reference, reversed(papers.values())))


def _reference(paper: Paper) -> str:
    authors = "".join(map(_author, paper.authors))
    venue = _quote(paper.venue)
    return f"""\
  - type: {"article" if paper.journal else "conference-paper"}
    title: {_quote(paper.title)}
    authors:
{authors}\
    {f"journal: {venue}" if paper.journal else f"conference: {{name: {venue}}}"}
    year: {paper.year}
    url: https://arxiv.org/abs/{paper.arxiv}
"""


def _author(name: str) -> str:
    family, _, given = name.partition(", ")
    return f"      - {{family-names: {_quote(family)}, given-names: {_quote(given)}}}\n"


def _quote(text: str) -> str:
    # A string of JSON is one of YAML, whatever it holds.
    return json.dumps(text, ensure_ascii=False)
