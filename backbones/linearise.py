"""Another token mixer in the place of a trained model's softmax attention."""

from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import nn

from .checkpoint import TimmModel
from .conversion import PREPARATION, convert_timm_model
from .mixers import MIXERS, MixerOptions
from .skeletons.vit import VisionTransformer


def swap_mixers(
    model: nn.Module,
    mixer: str,
    blocks: Iterable[int] | None = None,
    mixer_options: MixerOptions | None = None,
) -> TimmModel:
    """A copy of a vision transformer with another token mixer in some of its blocks.

    All other weights are the model's. A new mixer starts with the projections of the old one: q, k
    and v, and the output's. A further block of its input projection, a gate, starts as ones.

    Args:
        model: a model that `convert_timm_model` takes.
        mixer: name of the new mixer, a key of `linsight.backbones.mixers.MIXERS`.
        blocks: indices of the blocks that get it, counted through all stages, negative ones from
            the end; None for all.
        mixer_options: keyword arguments by mixer.

    Returns:
        The new model in evaluation mode, of the same registered name, whose `model_args` have the
        mixer of each block.

    Raises:
        ValueError: if the model is not supported, a block does not exist, or the mixer cannot
            stand in this body.
    """
    teacher: Any = convert_timm_model(model)
    places = teacher.block_places()
    depth = len(places)
    chosen = set(range(depth)) if blocks is None else set(blocks)
    if not chosen or not chosen <= set(range(-depth, depth)):
        raise ValueError(
            f"blocks is {sorted(chosen)}, expected at least one index from {-depth} to {depth - 1}"
        )
    chosen = {i % depth for i in chosen}
    known = {kind: name for name, kind in MIXERS.items()}
    names = [known[type(blocks[i].mixer)] for blocks, i in places]
    if others := [i for i in sorted(chosen) if names[i] not in ("softmax", "window")]:
        raise ValueError(
            f"blocks {', '.join(map(str, others))} hold {', '.join(names[i] for i in others)}, and "
            "softmax attention alone is swapped"
        )
    names = [mixer if i in chosen else name for i, name in enumerate(names)]
    old_options = dict(teacher.model_args.get("mixer_options") or {})
    options = old_options | dict(mixer_options or {})
    if idle := sorted(set(mixer_options or {}) - set(names)):
        raise ValueError(
            f"mixer_options is for {', '.join(idle)}, and the blocks hold {', '.join(set(names))}"
        )
    kept = {name for i, name in enumerate(names) if i not in chosen}
    if shared := [n for n in sorted(kept) if options.get(n) != old_options.get(n)]:
        raise ValueError(
            f"mixer_options is for {shared[0]}, which also stands in blocks that are kept, with "
            f"{old_options.get(shared[0]) or 'its own options'}: all blocks of a mixer share them"
        )
    # One name per block: in one list, or in a list per stage.
    lengths = [len(blocks) for blocks, i in places if not i]
    rest = iter(names)
    per_stage = [tuple(next(rest) for _ in range(length)) for length in lengths]
    chosen_names: Any = names if hasattr(teacher, "blocks") else tuple(per_stage)
    # A model may have got its classes from its weights, or from `reset_classifier`.
    arguments: dict[str, Any] = teacher.model_args | {
        "mixer": chosen_names,
        "num_classes": teacher.num_classes,
        "global_pool": teacher.global_pool
        if isinstance(teacher, VisionTransformer)
        else teacher.head.global_pool.pool_type,
    }
    if options:
        arguments["mixer_options"] = options
    like = next(teacher.parameters())
    settings = {
        key: value
        for key, value in teacher.pretrained_cfg.items()
        if key in (*PREPARATION, "label_names")
    }
    with like.device:
        student: Any = timm.create_model(
            teacher.pretrained_cfg["architecture"], pretrained_cfg_overlay=settings, **arguments
        )
    weights, old = student.state_dict(), teacher.state_dict()
    found = {module: name for name, module in teacher.named_modules()}
    swapped = [f"{found[stage[index].mixer]}." for stage, index in (places[i] for i in chosen)]
    for name in sorted(weights.keys() | old.keys()):
        shapes = [tuple(w[name].shape) if name in w else None for w in (old, weights)]
        if shapes[0] == shapes[1]:
            weights[name] = old[name]
        elif not name.startswith(tuple(swapped)):
            raise ValueError(
                f"the model's {name} has shape {shapes[0]}, and {shapes[1]} by its model_args: it "
                "was changed after it was built"
            )
    for prefix in swapped:
        _take_projections(weights, old, f"{prefix}in_proj.")
    student.load_state_dict(weights)
    return student.to(like.dtype).eval()


def _take_projections(weights: dict[str, Any], old: dict[str, Any], prefix: str) -> None:
    """Let a wider input projection start with the old one's q, k and v, and a gate of ones."""
    weight, bias = f"{prefix}weight", f"{prefix}bias"
    if weight not in weights or len(weights[weight]) <= len(old[weight]):
        return
    rest = len(weights[weight]) - len(old[weight])
    zeros = weights[weight].new_zeros(rest, weights[weight].shape[1])
    weights[weight] = torch.cat((old[weight], zeros))
    weights[bias] = torch.cat((old[bias], old[bias].new_ones(rest)))
