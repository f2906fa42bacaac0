"""CARE: decoupled linear attention and local convolutions (arXiv:2411.16170, CVPR 2025)."""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.linear_attention import linear_attention
from ..context import Context, Place
from ..initialization import init_linear_layers
from ..layers import BatchNormAct2d, DepthwiseConv2d, absorb_norm, normalize_tokens
from ..mlps import ActDepthwiseMlp
from .base import TokenMixer, refuse_prefix_tokens, register_mixer
from .projected import rename_entries

PARTS = 4
AUTHORS_NAMES = {
    "token_mixer.qk.": "in_proj.",
    "token_mixer.dwconv1.": "conv3.",
    "token_mixer.dwconv2.": "conv7.",
    "token_mixer.dwconvatt_1.": "strips.0.",
    "token_mixer.dwconvatt_2.": "strips.1.",
    "inter_layer.inter1_norm.": "norm.",
    "inter_layer.inter1_fc1.": "interaction.fc1.",
    "inter_layer.inter1_conv.": "interaction.depthwise.",
    "inter_layer.inter1_fc2.": "interaction.fc2.",
}


@register_mixer("care")
class Care(TokenMixer):
    """The channels in four equal parts: memory, attention, 3 x 3 and 7 x 7 convolution.

    The memory passes as it is. The attention is linear, with features elu + 1, and takes its input
    itself as values; its heads share a quarter of the channels. The three mixed parts f then
    interact: f <- f + fc2(depthwise(gelu(fc1(norm(f))))) with a batch norm.

    Args:
        place: where the mixer stands.
        ratio: hidden width of the interaction over its width.
        strip: length, odd, of a vertical and a horizontal depthwise convolution whose sum stands
            in the place of the attention; 0 for attention.

    Raises:
        ValueError: if a quarter of the channels cannot be shared by the heads, or if there are
            class tokens, which no convolution of a map takes.
    """

    # A ModuleList, or None beside attention.
    strips: Any

    def __init__(self, place: Place, *, ratio: float = 2.0, strip: int = 0) -> None:
        super().__init__()
        refuse_prefix_tokens(place, "CARE convolves a map alone")
        if place.dim % (PARTS * place.num_heads):
            raise ValueError(
                f"dim is {place.dim} and num_heads {place.num_heads}: a quarter of the channels "
                "is shared by the heads, so choose a width that is a multiple of "
                f"{PARTS * place.num_heads}"
            )
        part = place.dim // PARTS
        self.num_heads = place.num_heads
        self.in_proj = self.strips = None
        if strip:
            self.strips = nn.ModuleList(
                DepthwiseConv2d(part, window) for window in ((strip, 1), (1, strip))
            )
        else:
            self.in_proj = nn.Linear(part, 2 * part)
        self.conv3 = DepthwiseConv2d(part, 3)
        self.conv7 = DepthwiseConv2d(part, 7)
        mixed = place.dim - part
        self.norm = BatchNormAct2d(mixed)
        self.interaction = ActDepthwiseMlp(mixed, int(ratio * mixed))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, H * W, C) to (B, H * W, C)."""
        memory, attended, *convolved = x.chunk(PARTS, -1)
        attended = self.attend(attended, context)
        near, far = (
            tokens_of(conv(as_image(part, context)))
            for conv, part in zip((self.conv3, self.conv7), convolved, strict=True)
        )
        mixed = torch.cat((attended, near, far), -1)
        mixed = mixed + self.interaction(normalize_tokens(self.norm, mixed), context)
        return torch.cat((memory, mixed), -1)

    def attend(self, x: Tensor, context: Context) -> Tensor:
        """The linear attention of a part (B, H * W, C / 4), or the convolutions in its place."""
        if self.in_proj is None:
            columns, rows = self.strips
            image = as_image(x, context)
            return tokens_of(columns(image) + rows(image))
        # PyTorch adds the bias of tokens in two axes in a pass of its own, unless they are dense.
        projected = self.in_proj(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        query, key = projected.unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return linear_attention(query, key, x.unflatten(-1, (self.num_heads, -1))).flatten(2)

    def init_weights(self, place: Place) -> None:
        init_linear_layers(self, place.init_std, convolutions=True)

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' token mixer and first interaction; 1 x 1 convolutions are linear layers."""
        entries = rename_entries(entries, AUTHORS_NAMES)
        linear = {name for name, part in self.named_modules() if isinstance(part, nn.Linear)}
        return {
            name: value.flatten(1) if name.removesuffix(".weight") in linear else value
            for name, value in entries.items()
        }

    def fuse(self) -> nn.Module:
        """This mixer, with its batch norm multiplied into the interaction's first layer."""
        self.norm = absorb_norm(self.norm, self.interaction.fc1)
        return self


def as_image(tokens: Tensor, context: Context) -> Tensor:
    """Tokens (B, H * W, C) of the map of `context` as (B, C, H, W), a view."""
    return tokens.unflatten(1, context.size).permute(0, 3, 1, 2)


def tokens_of(image: Tensor) -> Tensor:
    """(B, C, H, W) as tokens (B, H * W, C), a view if channels are last in memory."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)
