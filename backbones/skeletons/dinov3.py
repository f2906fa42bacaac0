"""Checkpoints of DINOv3 (arXiv:2508.10104) under the names of the plain vision transformer."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Patterns of names, and what replaces them: of transformers, of DINOv3's authors and of timm's Eva.
NAMES = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens$|^storage_tokens$", "reg_token"),
    (r"^embeddings\.", ""),
    (r"^(?:model\.)?layer\.", "blocks."),
    (r"\.attention\.o_proj\.|\.attn\.proj\.", ".mixer.out_proj."),
    (r"(?<!\.mixer)\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1$|\.ls(\d)\.gamma$|\.gamma_(\d)$", r".gamma\1\2\3"),
    (r"\.mlp\.down_proj\.|\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.|\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
)
# What pretraining alone reads, and the frequencies of the rotation, which are constants.
UNUSED = re.compile(r"mask_token$|^local_cls_norm\.|^projectors\.|^rope")


def convert_dinov3(state_dict: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """A checkpoint of DINOv3 under this library's names; other entries stay as they are.

    It may be one of timm's Eva, of DINOv3's authors or of transformers. All three rotate channel i
    of a head with channel i + D / 2, where this library rotates neighbours: the rows of the
    projections of queries and keys change places.

    Args:
        state_dict: the weights.
        num_heads: heads of each block.
    """
    ends = [name for name in state_dict if name.endswith("embeddings.cls_token")]
    prefix = ends[0].removesuffix("embeddings.cls_token") if ends else ""
    # What stands on transformers' backbone is left out.
    converted = {
        _rename(name.removeprefix(prefix)): value
        for name, value in state_dict.items()
        if name.startswith(prefix) and not UNUSED.search(name.removeprefix(prefix))
    }
    gated = any(".mlp.fc1_g." in name for name in converted)
    for name in [name for name in converted if ".mlp.up_proj." in name]:
        first = name.replace("up_proj", "fc1_x" if gated else "fc1")
        converted[first] = converted.pop(name)
    blocks: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in converted if ".attn." in name]:
        block, _, entry = name.partition(".attn.")
        blocks.setdefault(block, {})[entry] = converted.pop(name)
    for block, entries in blocks.items():
        packed = pack_projections(entries, num_heads)
        converted |= {f"{block}.mixer.{name}": value for name, value in packed.items()}
    return converted


def _rename(name: str) -> str:
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name


def pack_projections(entries: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """An attention's entries with one projection `in_proj` to q, k and v, for rotated neighbours.

    Args:
        entries: `qkv.weight`, and perhaps `qkv.bias` with the mask `qkv.bias_mask` of the authors,
            or timm's `q_bias` and `v_bias`; or `q_proj.weight`, `k_proj.weight` and so on. A bias
            that is missing is zero. Others pass through.
        num_heads: heads.
    """
    rest = dict(entries)
    if "qkv.weight" in rest:
        weights = rest.pop("qkv.weight").chunk(3)
        bias, mask = rest.pop("qkv.bias", None), rest.pop("qkv.bias_mask", None)
        if bias is not None and mask is not None:
            bias = bias.masked_fill(mask == 0, 0)
        apart = [rest.pop(f"{part}_bias", None) for part in "qkv"]
        biases = apart if bias is None else bias.chunk(3)
    elif all(f"{part}_proj.weight" in rest for part in "qkv"):
        weights = [rest.pop(f"{part}_proj.weight") for part in "qkv"]
        biases = [rest.pop(f"{part}_proj.bias", None) for part in "qkv"]
    else:
        return rest  # what is missing is named where the weights are loaded
    filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    for kind, (q, k, v) in (("weight", weights), ("bias", filled)):
        parts = (_neighbours(q, num_heads), _neighbours(k, num_heads), v)
        rest[f"in_proj.{kind}"] = torch.cat(parts)
    return rest


def _neighbours(rows: Tensor, num_heads: int) -> Tensor:
    """Rows 0, D / 2, 1, D / 2 + 1, ... of each head's D rows (heads * D, ...)."""
    if len(rows) % (2 * num_heads):
        return rows  # those of another model, whose shape is named where it is loaded
    halves = rows.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)
