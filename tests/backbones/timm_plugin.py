"""A pytest plugin that points timm's own tests/test_models.py at the models of the zoo.

timm's tests ask `timm.list_models` what to test; here it answers with our models only. Weights
that the tests would download are written to a file instead, so that nothing is fetched and
timm's adaptation of weights to other channels and classes still runs.
"""

import functools
import tempfile
from pathlib import Path

import timm
import torch
from timm.models import _hub

from linsight.backbones import ZOO

# One of the patterns by which timm names models whose features are tokens, not maps.
TOKENS = "vit_*"


def narrowed(function):
    @functools.wraps(function)
    def ours(filter="", *, exclude_filters="", **kwargs):
        # timm's lists of modules with a feature cannot name ours, which have every feature.
        kwargs.pop("module", None)
        only, never = TOKENS in filter, TOKENS in exclude_filters
        names = function("" if only else filter, exclude_filters=exclude_filters, **kwargs)
        return [
            name
            for name in names
            if (row := ZOO.get(name.split(".")[0]))
            and not (only and row.family.skeleton.output_fmt != "NLC")
            and not (never and row.family.skeleton.output_fmt == "NLC")
        ]

    return ours


def hub_file(hub_id, filename, **_):
    """A file of weights for the model whose hub file this is."""
    if not filename.endswith(".pth"):
        raise _hub.EntryNotFoundError(f"{hub_id} has no {filename}")
    (name,) = (
        name
        for name, model in ZOO.items()
        if any((w.hub_id, w.filename) == (hub_id, filename) for w in model.weights.values())
    )
    path = Path(tempfile.gettempdir()) / f"linsight_timm_{name}.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    return str(path)


timm.list_models = narrowed(timm.list_models)
timm.list_pretrained = narrowed(timm.list_pretrained)
_hub.hf_hub_download = lambda repo_id=None, filename=None, *args, **kwargs: hub_file(
    args[0] if args else repo_id, filename
)
