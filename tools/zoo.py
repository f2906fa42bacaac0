"""Write the files that are generated from the zoo: `python -m linsight.tools.zoo`, in a checkout.

Counts of operations take a minute, and are kept in `backbones/zoo/counts.csv`, from which
`linsight models` prints without building a model. The rest are pages for users, and parts of pages.
"""

from collections.abc import Mapping
from pathlib import Path

from rich.progress import track

from linsight.backbones import ZOO
from linsight.backbones.registry import Model, Weights
from linsight.tools import citation, model_cards, zoo_tables
from linsight.tools.families import family_name
from linsight.tools.kernel_use import record_kernel_use
from linsight.tools.models import COUNTS, count

FIRST = "<!-- The lines from here on are written by `python -m linsight.tools.zoo`. -->\n"
LAST = "<!-- The lines up to here are written by `python -m linsight.tools.zoo`. -->\n"

START = """\
# The zoo

Written by `python -m linsight.tools.zoo`; do not edit it.

- **M**: millions of parameters. **GMACs**: multiply-adds of convolutions and matrix products of
  one image of 224 x 224, attention included. SOFT's papers give 1.9, 3.3, 7.2, 11.0 and 16.3: they
  are ours to 3 % without the landmark matrices' inverses: 0.19, 0.40, 1.29, 1.95 and 2.64.
- The accuracies are the papers' and their repositories', in percent; we have not trained these
  models ourselves. **top-1**: ImageNet-1K at 224 px or at the size beside it, with the first of
  the weights where there are several. **box, mask**: AP on COCO val2017 of Mask R-CNN, schedule
  1x. **mIoU**: ADE20K, UperNet, 160,000 iterations of 512 x 512 crops, tested at one scale.
  Figures of other detectors, heads and schedules are not listed.
- **weights**: a tag such as `ms_in1k` loads by `timm.create_model("NAME.TAG", pretrained=True)`;
  one marked *by hand* is downloaded from its page and goes through `linsight convert`
  ([weights](weights.md)).
- [Model cards](model_cards.md): what each family computes, was trained on, and is not for.

"""

MODELS = """\
| model | M | GMACs | top-1 | box, mask | mIoU | weights |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
"""

FAMILIES = """
## Papers, licences, kernels

The licence is that of the repository that releases the weights; *none stated*: it has no licence
file, ask its authors. The operators are those of `torch.ops.linsight` that a forward pass of the
family's first model launches on a GPU at 224 px, all Triton kernels. Layer norms, rotary
embeddings, layer scales, convolutions of images, batch norms in training, a convolution's bias and
activation, and the local branch and gate around softmax attention have kernels for eager calls;
compiled, they are the compiler's. Softmax attention over all tokens is PyTorch's
`scaled_dot_product_attention`; matrix products and other strided convolutions are PyTorch's too.

| models | paper | code | licence of the weights | operators with kernels |
| --- | --- | --- | --- | --- |
"""


def write(repository: Path) -> None:
    """Count the operations of every model, and write every file that is generated from the zoo."""
    counts = {name: count(name) for name in track(ZOO, "Counting operations")}
    for path, text in generate(repository, counts).items():
        path.write_text(text)


def generate(repository: Path, counts: Mapping[str, tuple[int, int]]) -> dict[Path, str]:
    """The texts of the generated files by their paths.

    Args:
        repository: a checkout, whose hand-written lines stay.
        counts: parameters and multiply-adds of each model by its name.
    """
    rows = (
        f"{name},{parameters},{macs},{_listed(ZOO[name])}\n"
        for name, (parameters, macs) in counts.items()
    )
    models, weights = (repository / "docs" / page for page in ("models.md", "weights.md"))
    cff = repository / "CITATION.cff"
    head, title, _ = cff.read_text().partition("\nreferences:\n")
    return {
        COUNTS: "model,parameters,multiply_adds,top1,weights,arxiv\n" + "".join(rows),
        repository / "docs" / "zoo.md": page(counts),
        repository / "docs" / "model_cards.md": model_cards.page(),
        weights: replace_lines(weights.read_text(), zoo_tables.hosts()),
        models: replace_lines(models.read_text(), zoo_tables.summary(counts)),
        cff: head + title + citation.references(),
    }


def replace_lines(text: str, lines: str) -> str:
    """A page with other lines between `FIRST` and `LAST`.

    Raises:
        ValueError: if the page lacks one of the two.
    """
    head, first, rest = text.partition(FIRST)
    _, last, tail = rest.partition(LAST)
    if not (first and last):
        raise ValueError(f"text has no lines between {FIRST!r} and {LAST!r}: put them back")
    return f"{head}{FIRST}\n{lines}\n{LAST}{tail}"


def page(counts: Mapping[str, tuple[int, int]]) -> str:
    """The page docs/zoo.md, in Markdown.

    Args:
        counts: parameters and multiply-adds of each model by its name.
    """
    lines = [START, MODELS]
    families: dict[str, str] = {}
    for name in sorted(ZOO, key=family_name):
        lines.append(_model(name, ZOO[name], *counts[name]))
        families.setdefault(family_name(name), name)
    lines.append(FAMILIES)
    lines += [_family(prefix, name) for prefix, name in families.items()]
    return "".join(lines)


def operators(name: str) -> list[str]:
    """Operators of `torch.ops.linsight` that a model launches for one image of 224 x 224."""
    _, uses = record_kernel_use(name, (224, 224))
    return sorted(set().union(*(use.registered for use in uses.values())))


def _model(name: str, row: Model, parameters: int, macs: int) -> str:
    cells = (
        f"`{name}`",
        f"{parameters / 1e6:.1f}",
        f"{macs / 1e9:.2f}",
        _top1(row),
        "{:.1f}, {:.1f}".format(*row.mask_rcnn) if row.mask_rcnn else "-",
        f"{row.upernet:.1f}" if row.upernet else "-",
        ", ".join(_weights(tag, weights) for tag, weights in row.weights.items()) or "-",
    )
    return f"| {' | '.join(cells)} |\n"


def _listed(row: Model) -> str:
    """What `linsight models` prints of a row beside its counts, as fields of a CSV file."""
    top1 = f"{row.top1:.1f}" + f"@{row.top1_size}" * (row.top1_size != 224) if row.top1 else ""
    tags = (tag + "*" * bool(w.page) for tag, w in row.released.items())
    return f"{top1},{' '.join(tags)},{row.family.paper.arxiv}"


def _top1(row: Model) -> str:
    if row.top1 is None:
        return "-"
    return f"{row.top1:.1f}" + (f" ({row.top1_size} px)" if row.top1_size != 224 else "")


def _weights(tag: str, weights: Weights) -> str:
    if weights.address is None:
        return f"{tag} *not released*"
    return f"[{tag}]({weights.address})" + " *by hand*" * bool(weights.page)


def _family(prefix: str, name: str) -> str:
    paper = ZOO[name].family.paper
    cells = (
        f"`{prefix}_*`",
        f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})",
        f"[{paper.origin.removeprefix('https://github.com/')}]({paper.origin})",
        paper.license or "none stated",
        ", ".join(operators(name)),
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    write(Path(__file__).resolve().parents[1])
