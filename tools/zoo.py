"""Write the files that are generated from the zoo: `python -m linsight.tools.zoo`, in a checkout.

Counts of operations take a minute, and are kept in `backbones/zoo/counts.csv` for
`linsight models`; docs/zoo.md and docs/model_cards.md are pages for users.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode

from linsight.backbones import ZOO
from linsight.backbones.registry import Model, Weights
from linsight.kernels import force
from linsight.tools import model_cards
from linsight.tools.models import COUNTS, count

START = """\
# The zoo

Written by `python -m linsight.tools.zoo`; do not edit it.

- **M**: millions of parameters. **GMACs**: multiply-adds of convolutions and matrix products of
  one image of 224 x 224, attention included. SOFT's papers give 1.9, 3.3, 7.2, 11.0 and 16.3: they
  are ours to 3 % without the landmark matrices' inverses: 0.19, 0.40, 1.29, 1.95 and 2.64.
- The accuracies are the papers' and their repositories', in percent; we have not trained these
  models ourselves. **top-1**: ImageNet-1K at 224 px, with the first of the weights where there
  are several. **box, mask**: AP on COCO val2017 of Mask R-CNN, schedule 1x. **mIoU**: ADE20K,
  UperNet, 160,000 iterations of 512 x 512 crops, tested at one scale. Figures of other detectors,
  heads and schedules are not listed.
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
    """Count the operations of every model; write the table of counts and the pages."""
    counts = {name: count(name) for name in track(ZOO, "Counting operations")}
    rows = (f"{name},{parameters},{macs}\n" for name, (parameters, macs) in counts.items())
    COUNTS.write_text("model,parameters,multiply_adds\n" + "".join(rows))
    (repository / "docs" / "zoo.md").write_text(page(counts))
    (repository / "docs" / "model_cards.md").write_text(model_cards.page())


def page(counts: Mapping[str, tuple[int, int]]) -> str:
    """The page docs/zoo.md, in Markdown.

    Args:
        counts: parameters and multiply-adds of each model by its name.
    """
    lines = [START, MODELS]
    families: dict[str, str] = {}
    for name in sorted(ZOO, key=_prefix):
        lines.append(_model(name, ZOO[name], *counts[name]))
        families.setdefault(_prefix(name), name)
    lines.append(FAMILIES)
    lines += [_family(prefix, name) for prefix, name in families.items()]
    return "".join(lines)


def operators(name: str) -> list[str]:
    """Operators of `torch.ops.linsight` that a model launches for one image of 224 x 224.

    They are found on the meta device, so that no GPU is needed: nothing is launched. Kernels that
    are forced to run without a GPU ask for ``TRITON_INTERPRET=1`` in the environment.
    """
    with torch.device("meta"), force("triton"), torch.inference_mode():
        model = timm.create_model(name).eval()
        with _Recorder() as recorder:
            model(torch.empty(1, 3, 224, 224))
    return sorted(recorder.names)


class _Recorder(TorchDispatchMode):
    """Collects the names of linsight's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "linsight":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def _prefix(name: str) -> str:
    return name.rpartition("_")[0]


def _model(name: str, row: Model, parameters: int, macs: int) -> str:
    cells = (
        f"`{name}`",
        f"{parameters / 1e6:.1f}",
        f"{macs / 1e9:.2f}",
        f"{row.top1:.1f}" if row.top1 else "-",
        "{:.1f}, {:.1f}".format(*row.mask_rcnn) if row.mask_rcnn else "-",
        f"{row.upernet:.1f}" if row.upernet else "-",
        ", ".join(_weights(tag, weights) for tag, weights in row.weights.items()) or "-",
    )
    return f"| {' | '.join(cells)} |\n"


def _weights(tag: str, weights: Weights) -> str:
    address = weights.url or weights.page or f"https://huggingface.co/{weights.hub_id}"
    return f"[{tag}]({address})" + ("" if weights.url or weights.hub_id else " *by hand*")


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
    os.environ["TRITON_INTERPRET"] = "1"
    write(Path(__file__).resolve().parents[1])
