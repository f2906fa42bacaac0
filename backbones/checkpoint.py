"""How weights are unwrapped, renamed and checked before a model loads them."""

import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Training scripts save weights beside their optimiser and arguments. These keys are in the order of
# choice, timm's first; averaged weights come before raw ones.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema")
RAW = ("state_dict", "model", "model_state_dict", "model_state", "net", "params")
# Attributes in which transformers' wrapper of timm's models and users of Lightning hold a model.
_HOLDERS = ("model.", "timm_model.", "net.")
# A LightningModule's weights of classes, beside its model.
_LOSSES = ("criterion.", "loss.", "loss_fn.")
# What averages keep beside the weights.
_COUNTERS = ("n_averaged", "steps", "num_updates", "updates", "decay")
# Modules by which PyTorch wraps a model or its parts.
_WRAPPERS = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_WRAPPED = re.compile(rf"^(?:(?:module|{_WRAPPERS})\.)+|(?<![^.])(?:{_WRAPPERS})\.")
SHOWN = 3


class TimmModel(nn.Module):
    """The interface of timm's models, as far as it is used here.

    Attributes:
        pretrained_cfg: timm's entry of the weights, with the preparation of images.
        num_classes: number of classes, 0 without a classifier.
        in_chans: channels of the images.
        num_features, head_hidden_size: channels of the features, and before the classifier.
        feature_info: per level its channels "num_chs", its stride "reduction" and its "module".
        norm: what is applied to the last level.
        model_args: on this library's models, the arguments with which `timm.create_model` and the
            name in `pretrained_cfg["architecture"]` build the model again.
    """

    pretrained_cfg: dict[str, Any]
    num_classes: int
    in_chans: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    norm: nn.Module
    model_args: dict[str, Any]
    # They are in every skeleton, and in most models of timm.
    forward_intermediates: Callable[..., Any]
    prune_intermediate_layers: Callable[..., Any]
    set_grad_checkpointing: Callable[..., Any]
    group_matcher: Callable[..., dict[str, Any]]
    get_classifier: Callable[..., Any]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, does not fit, or cannot be written."""


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights of a training checkpoint, under the names of the model that was trained.

    Where there are averaged weights they are taken, which one logged line says if there are raw
    ones beside them; under a key that is not known the only weights of the checkpoint are taken.
    What PyTorch's wrappers of models put before names is left out, and so is ``model.`` before all
    of them, or the attribute in which a LightningModule holds its model. Other state dicts are
    returned as they are.
    """
    averaged = [key for key in AVERAGED if not is_raw(checkpoint, key)]
    for key in (*averaged, *RAW):
        weights = _find(checkpoint.get(key))
        if weights is None:
            continue
        if key in AVERAGED and any(_find(checkpoint.get(other)) is not None for other in RAW):
            logger.warning("the averaged weights (%s) of the checkpoint are taken", key)
        if "pytorch-lightning_version" in checkpoint:
            weights = {k: v for k, v in weights.items() if not k.startswith(_LOSSES)}
            if len(attributes := {name.partition(".")[0] for name in weights}) == 1:
                start = len(attributes.pop()) + 1
                weights = {name[start:]: value for name, value in weights.items()}
        return clean_names(weights, own="meta" in checkpoint)
    found = [weights for entry in checkpoint.values() if (weights := _find(entry)) is not None]
    return clean_names(found[0] if len(found) == 1 else checkpoint)


def is_raw(checkpoint: Mapping[str, Any], key: str) -> bool:
    """Whether the entry `key` is mmengine's ``ema_state_dict``, which on saving has changed places
    with the averaged ``state_dict``."""
    entry = checkpoint.get(key)
    mmengines = isinstance(entry, Mapping) and "steps" in entry
    return key == "ema_state_dict" and mmengines and "state_dict" in checkpoint


def _find(entry: Any) -> Mapping[str, Any] | None:
    """The mapping of names to tensors in an entry of a checkpoint, or None."""
    if not isinstance(entry, Mapping):
        return None
    inner = (_find(entry.get(key)) for key in ("module", *RAW))
    found = next((each for each in inner if each is not None), None)
    if found is None and any(isinstance(value, Tensor) for value in entry.values()):
        return entry
    return found


def clean_names(weights: Mapping[str, Any], own: bool = False) -> Mapping[str, Any]:
    """The weights without what wrappers of a model put before their names.

    Args:
        weights: the weights.
        own: whether ``model.`` or the like before all names is a part of the model, as in
            mmengine's checkpoints.
    """
    if not weights or not all(isinstance(name, str) for name in weights):
        return weights
    counters = {name for name in weights if name in _COUNTERS}
    names = {name: _WRAPPED.sub("", name) for name in weights if name not in counters}
    while not own and names and (holder := _holder(names.values())):
        names = {old: _WRAPPED.sub("", name[len(holder) :]) for old, name in names.items()}
    if all(old == new for old, new in names.items()):
        return weights
    return {new: weights[old] for old, new in names.items()}


def _holder(names: Collection[str]) -> str | None:
    """Which of the known attributes all names begin with."""
    return next((each for each in _HOLDERS if all(name.startswith(each) for name in names)), None)


def rename(name: str, names: Mapping[str, str]) -> str:
    """A weight's name with each part that is a key of `names` replaced, the first key first."""
    keys = "|".join(map(re.escape, names))
    return re.sub(keys, lambda found: names[found[0]], name)


def convert_mixers(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights, in which each token mixer has converted its own entries.

    Args:
        state_dict: the weights, in which a mixer's entries have its own name as their prefix.
        model: each of its modules with a method `convert_checkpoint` converts its entries.
    """
    mixers: dict[str, Any] = {
        n: m for n, m in model.named_modules() if hasattr(m, "convert_checkpoint")
    }
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in mixers}
    state_dict = dict(state_dict)
    rename_old_entries(state_dict, model)
    converted = {}
    for name, value in state_dict.items():
        owner = name
        while owner and owner not in mixers:
            owner = owner.rpartition(".")[0]
        if owner:
            parts[owner][name[len(owner) + 1 :]] = value
        else:
            converted[name] = value
    for owner, entries in parts.items():
        for name, value in mixers[owner].convert_checkpoint(entries).items():
            converted[f"{owner}.{name}"] = value
    return converted


# Patterns of names that version 0.1 of linsight wrote, each with a function that makes the name
# of today. A name is replaced only if the model has the new one.
OLD_NAMES: tuple[tuple[str, Callable[[re.Match], str]], ...] = (
    # A stem was one sequence of convolutions, batch norms and activations in turn.
    (
        r"^stem\.(\d+)\.(weight|bias|running_mean|running_var|num_batches_tracked)$",
        lambda m: f"stem.{int(m[1]) // 3}.{('conv', 'norm', 'act')[int(m[1]) % 3]}.{m[2]}",
    ),
    (r"\.downsample\.0\.(conv|norm)\.", lambda m: f".downsample.{m[1]}."),
    # The local branch and the bias tables were parameters of the mixer itself.
    (r"\.mixer\.local\.(weight|bias)$", lambda m: f".mixer.attention.local_{m[1]}"),
    (
        r"\.mixer\.((?:map|row|column|prefix)_bias|relative_position_bias_table)$",
        lambda m: f".mixer.attention.{m[1]}",
    ),
)


def rename_old_entries(state_dict: dict[str, Tensor], model: nn.Module, prefix: str = "") -> None:
    """Rename, in place, entries that version 0.1 of linsight wrote; log one line if there are any.

    Its tables of agent attention over a 7 x 7 map had two axes for the map, which are one today.

    Args:
        state_dict: the weights.
        model: a model of this library.
        prefix: the beginning of the names of the model's entries in `state_dict`.
    """
    own = model.state_dict().keys()
    renamed = {}
    for name in state_dict:
        if not name.startswith(prefix) or (inner := name[len(prefix) :]) in own:
            continue
        for pattern, new in OLD_NAMES:
            if (today := re.sub(pattern, new, inner)) != inner and today in own:
                renamed[name] = prefix + today
    for old, new in renamed.items():
        state_dict[new] = state_dict.pop(old)
    for name, value in state_dict.items():
        if name.startswith(prefix) and name.endswith(".map_bias") and value.ndim == 5:
            state_dict[name] = value.flatten(-2)
    if renamed:
        logger.warning(
            "%d weights have the names of linsight 0.1 and were renamed; save the model again to "
            "keep today's names",
            len(renamed),
        )


def resize_position(
    position: Tensor,
    size: tuple[int, int],
    prefix_tokens: int,
    old: tuple[int, int] | None = None,
    interpolation: str = "bicubic",
) -> Tensor:
    """A position embedding (1, P + h * w, C), interpolated to a map of (H, W).

    Args:
        position: the embedding.
        size: (H, W).
        prefix_tokens: P.
        old: (h, w). If it is None, an embedding that has the size of `size` already, or whose map
            is not square, is returned as it is.
        interpolation: 'bicubic' (with antialiasing) or 'bilinear' (without).
    """
    if old is None:
        tokens = position.shape[1] - prefix_tokens
        side = math.isqrt(max(tokens, 0))
        old = (side, side)
        if tokens == size[0] * size[1] or side * side != tokens:
            return position
    if old == size:
        return position
    return resample_abs_pos_embed(
        position, list(size), list(old), prefix_tokens, interpolation, interpolation == "bicubic"
    )


def check_fit(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    message: str,
    ignore: tuple[str, ...] = (),
) -> None:
    """Refuse weights that are not this model's.

    Args:
        state_dict: the weights.
        model: the model that is to load them.
        message: the beginning of the error's message; how the weights differ follows.
        ignore: beginnings of names whose weights may be missing, left over or of another shape.

    Raises:
        CheckpointError: if a weight is missing, left over, or of another shape.
    """
    own, got = (
        {
            key: tuple(value.shape)
            for key, value in weights.items()
            # Weights that were saved before PyTorch counted batches have no counter.
            if not key.startswith(ignore) and not key.endswith("num_batches_tracked")
        }
        for weights in (model.state_dict(), state_dict)
    )
    faults = []
    for fault, keys in (
        ("missing", [key for key in own if key not in got]),
        ("unexpected", [key for key in got if key not in own]),
    ):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            faults.append(f"{len(keys)} weights {fault} ({', '.join(keys[:SHOWN])}{more})")
    reshaped = [key for key in own if got.get(key, own[key]) != own[key]]
    faults += [f"{key} is {got[key]}, the model's {own[key]}" for key in reshaped[:SHOWN]]
    if len(reshaped) > SHOWN:
        faults.append(f"and {len(reshaped) - SHOWN} more of another shape")
    if faults:
        raise CheckpointError(f"{message}: {'; '.join(faults)}")


def check_model(state_dict: Mapping[str, Tensor], model: TimmModel) -> None:
    """`check_fit`, but for the classifier and the first convolution, which timm adapts.

    Raises:
        CheckpointError: see `check_fit`.
    """
    config = model.pretrained_cfg
    classifiers = config["classifier"]
    adapted = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    check_fit(
        state_dict,
        model,
        f"the checkpoint is not of {config['architecture']}",
        ignore=tuple(f"{name}." for name in (*adapted, config["first_conv"])),
    )
