"""Whether published weights are at hand, known before anything waits for the network."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import get_pretrained_cfg

from linsight.backbones.checkpoint import CheckpointError

SECONDS = 3.0


def require_weights(model_name: str) -> None:
    """Check that a model's published weights are cached, or that the place that has them answers.

    Without a network the downloads would try again for minutes.

    Args:
        model_name: name for :func:`timm.create_model`. What timm does not know is left to timm.

    Raises:
        CheckpointError: the weights are not cached, and their place does not answer.
    """
    if ":" in model_name or not timm.is_model(model_name.split(".")[0]):
        return
    config = get_pretrained_cfg(model_name)
    if config is None or not (config.hf_hub_id or config.url) or is_cached(config):
        return
    address = constants.ENDPOINT if config.hf_hub_id else str(config.url)
    offline = constants.HF_HUB_OFFLINE and config.hf_hub_id
    if offline or not answers(address):
        raise CheckpointError(
            f"the weights of {model_name} are not in the cache, and {urlsplit(address).hostname} "
            "does not answer: give a file of weights (docs/weights.md says where they are); to "
            "train from scratch, --weights none with --data, or model.backbone.pretrained=False"
        )


def is_cached(config: timm.models.PretrainedCfg) -> bool:
    """Whether the weights that timm's entry `config` names have been downloaded."""
    if not config.hf_hub_id:
        name = Path(urlsplit(str(config.url)).path).name
        return Path(torch.hub.get_dir(), "checkpoints", name).is_file()
    repository = str(config.hf_hub_id).split("@")[0]
    names = [config.hf_hub_filename] if config.hf_hub_filename else []
    names += ["model.safetensors", "pytorch_model.bin"]
    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)


def answers(address: str) -> bool:
    """Whether the host of a web address accepts a connection, or the proxy on the way to it."""
    scheme = urlsplit(address).scheme
    proxy = os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme}_proxy".upper())
    place = urlsplit(proxy or address)
    port = place.port or {"http": 80}.get(place.scheme, 443)
    try:
        socket.create_connection((place.hostname or "", port), SECONDS).close()
    except OSError:
        return False
    return True
