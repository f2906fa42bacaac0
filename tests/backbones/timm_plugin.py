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
from timm.models import _builder, _hub

from linsight.backbones import ZOO

# These models give tokens, as the models do that timm's tests call non-standard.
TOKENS = ["*_deit_*", "softmax_dinov*", "softmax_pvt_*", "soft_vit_*", "soft_norm_vit_*"]


def narrowed(function):
    @functools.wraps(function)
    def ours(*args, **kwargs):
        for key in ("filter", "exclude_filters"):
            if "deit*" in kwargs.get(key, ()):
                kwargs[key] = [*kwargs[key], *TOKENS]
        # timm's lists of modules with a feature cannot name the zoo's, which have every feature.
        kwargs.pop("module", None)
        return [name for name in function(*args, **kwargs) if name.split(".")[0] in ZOO]

    return ours


def weights_file(hub_id, filename, url=None):
    """A file of weights for the model that has this hub file or address."""
    (name,) = (
        name
        for name, model in ZOO.items()
        if any(
            (w.hub_id, w.filename, w.url) == (hub_id, filename, url) for w in model.weights.values()
        )
    )
    path = Path(tempfile.gettempdir()) / f"linsight_timm_{name}.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    return str(path)


def hub_file(hub_id, filename):
    if filename.endswith(".safetensors"):
        raise _hub.EntryNotFoundError(f"{hub_id} has no {filename}")
    return weights_file(hub_id, filename)


timm.list_models = narrowed(timm.list_models)
timm.list_pretrained = narrowed(timm.list_pretrained)
_hub.hf_hub_download = lambda repo_id=None, filename=None, *args, **kwargs: hub_file(
    args[0] if args else repo_id, filename
)
_builder.load_state_dict_from_url = lambda url, **_: torch.load(
    weights_file(None, None, url), weights_only=True
)
