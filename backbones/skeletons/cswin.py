"""The four-stage body of CSwin (arXiv:2107.00652): Swin's, with overlapping patches."""

import re
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ..checkpoint import check_model, convert_mixers, unwrap
from ..layers import Conv2d
from ..norms import fold_into_convolution
from .swin import SwinTransformer


class ConvMerging(nn.Module):
    """3 x 3 convolution of stride 2, and a norm, from and to a map (B, H, W, C).

    Args:
        in_dim, dim: channels before and after.
        norm_layer: a callable that makes the norm of `dim` channels.
    """

    def __init__(self, in_dim: int, dim: int, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv = Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def fuse(self) -> nn.Module:
        """This layer, whose convolution has taken in the norm, if that is constant."""
        self.norm = fold_into_convolution(self.norm, self.conv)
        return self


class CSwinTransformer(SwinTransformer):
    """`SwinTransformer` whose patches overlap, in the embedding and in the merging."""

    merging: ClassVar[type[nn.Module]] = ConvMerging
    patches: ClassVar[dict[str, int]] = {"kernel_size": 7, "stride": 4, "padding": 2}


AUTHORS_NAMES = {
    "stage1_conv_embed.0.": "stem.proj.",
    "stage1_conv_embed.2.": "stem.norm.",
    "head.": "head.fc.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SwinTransformer) -> dict[str, Tensor]:
    """A checkpoint under this library's names.

    It may be one of Microsoft's CSwin, of a mixer's authors in this body, or of this library.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "stage1_conv_embed.0.weight" in state_dict:
        # The authors keep the operator of a block with one branch in a list, too.
        state_dict = {
            name
            if name.replace("attns.0.", "attns.1.") in state_dict
            else name.replace("attns.0.", "attns."): value
            for name, value in state_dict.items()
        }
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    state_dict = convert_mixers(state_dict, model)
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    for theirs, ours in AUTHORS_NAMES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    name = re.sub(r"^merge(\d)\.", lambda m: f"stages.{m[1]}.downsample.", name)
    name = re.sub(r"^stage(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.", name)
    # The authors keep a mixer's projections in the block, beside its branches.
    stem, dot, rest = name.rpartition(".blocks.")
    block, _, parameter = rest.partition(".")
    if re.match(r"qkv\.|proj\.|attns\.\d\.", parameter):
        parameter = f"mixer.{parameter}"
    parameter = re.sub(r"^attns\.", "mixer.", parameter)
    return f"{stem}{dot}{block}.{parameter}" if dot else name
