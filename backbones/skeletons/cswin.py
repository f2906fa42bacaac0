"""The four-stage skeleton of CSwin (arXiv:2107.00652): Swin's, with overlapping patches."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import check_model, unwrap
from ..layers import LayerNorm, checked_image, convolved
from ..mixers import fit_tables
from .swin import EPSILON, SwinTransformer


class OverlappingPatchEmbed(nn.Module):
    """7 x 7 convolution of stride 4, and a norm: (B, 3, H, W) to (B, (H + 1) / 4, ..., C)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2)
        self.norm = LayerNorm(dim, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        x = checked_image(x, self.proj.in_channels, 1)
        return self.norm(convolved(x, self.proj))


class ConvMerging(nn.Module):
    """3 x 3 convolution of stride 2, and a norm, from and to a map (B, H, W, C)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = LayerNorm(dim, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(convolved(x.permute(0, 3, 1, 2), self.conv))


class CSwinTransformer(SwinTransformer):
    """`SwinTransformer` whose patches overlap, in the embedding and in the merging."""

    merging = ConvMerging

    @staticmethod
    def embedding(in_chans: int, dim: int) -> nn.Module:
        return OverlappingPatchEmbed(in_chans, dim)


AUTHORS_NAMES = {
    "stage1_conv_embed.0.": "stem.proj.",
    "stage1_conv_embed.2.": "stem.norm.",
    "head.": "head.fc.",
}
# Of a block: what belongs to the mixer, which the authors keep outside their attention.
AUTHORS_MIXER = {"qkv.": "mixer.in_proj.", "proj.": "mixer.out_proj."}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of Microsoft's CSwin, of Agent-CSwin, or ours, under our names.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = unwrap(state_dict)
    if "stage1_conv_embed.0.weight" in state_dict:
        halves: dict[str, list[Tensor]] = {}
        for name, value in state_dict.items():
            # A convolution for the vertical stripes and one for the horizontal ones, in order.
            halves.setdefault(_our_name(name), []).append(value)
        state_dict = {
            name: torch.cat(values) if len(values) > 1 else values[0]
            for name, values in halves.items()
        }
    state_dict = fit_tables(state_dict, model)
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    for theirs, ours in AUTHORS_NAMES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    name = re.sub(r"^merge(\d)\.", lambda m: f"stages.{m[1]}.downsample.", name)
    name = re.sub(r"^stage(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.", name)
    stem, dot, rest = name.rpartition(".blocks.")
    block, _, parameter = rest.partition(".")
    for theirs, ours in AUTHORS_MIXER.items():
        if parameter.startswith(theirs):
            parameter = ours + parameter[len(theirs) :]
    parameter = re.sub(r"^attns\.\d\.get_v\.", "mixer.local.", parameter)
    parameter = re.sub(r"^attns\.\d\.", "mixer.", parameter)
    return f"{stem}{dot}{block}.{parameter}" if dot else name
