"""The four-stage skeleton of Swin (arXiv:2103.14030): patches, blocks and patch merging.

Maps travel as (B, H, W, C), contiguous; a mixer sees them as (B, H * W, C), a free view.
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from ..checkpoint import check_model, renamed, unwrap
from ..layers import LayerNorm, Linear, NormedPatchEmbed, TransformerBlock, padded
from ..mixers import (
    MixerNames,
    MixerOptions,
    Place,
    build_mixer,
    fit_tables,
    mixers_by_block,
)
from .hierarchy import HierarchicalVisionTransformer

PATCH = 4
EPSILON = 1e-5


class PatchMerging(nn.Module):
    """Four neighbours side by side, normed and projected: (B, H, W, C) to half the sides, 2 C.

    The neighbours (row, column) are in the order (0, 0), (1, 0), (0, 1), (1, 1).
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * in_dim, eps=EPSILON)
        self.reduction = Linear(4 * in_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = padded(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinStage(nn.Module):
    """Downsampling (none in the first stage) and blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        size = x.shape[1:3]
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
        return x.unflatten(1, size)


class SwinTransformer(HierarchicalVisionTransformer):
    """Patch embedding, four stages at strides 4, 8, 16 and 32, norm, and a pooling head.

    Every size runs: images and maps that a patch or a merging does not divide are padded with
    zeros at the bottom and right.

    Args:
        img_size: (H, W) or side of the images that the mixers' tables are made for.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dim: width of the first stage; each stage doubles it.
        depths, num_heads: blocks and heads of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one a stage, or
            within a stage one a block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry a stage.
        mlp_ratio: hidden width of the feed-forward network over its width.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: for an unknown mixer, or one that cannot stand here.
    """

    merging: ClassVar[type[nn.Module]] = PatchMerging

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.stem = self.embedding(in_chans, embed_dim)
        names = mixers_by_block(mixer, depths)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        size = tuple(-(-side // PATCH) for side in to_2tuple(img_size or 224))
        self.stages = nn.ModuleList()
        self.feature_info = []
        for i, heads in enumerate(num_heads):
            dim = embed_dim * 2**i
            blocks = [
                TransformerBlock(
                    dim,
                    build_mixer(name, Place(dim, heads, size, i, j), mixer_options),
                    mlp_ratio,
                    rate,
                    EPSILON,
                )
                for j, (name, rate) in enumerate(zip(names[i], drop_paths[i], strict=True))
            ]
            downsample = self.merging(dim // 2, dim) if i else nn.Identity()
            self.stages.append(SwinStage(downsample, blocks))
            self.feature_info.append(
                {"num_chs": dim, "reduction": PATCH * 2**i, "module": f"stages.{i}"}
            )
            size = tuple(-(-side // 2) for side in size)
        self.norm = LayerNorm(self.num_features, eps=EPSILON)
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt="NHWC"
        )
        self.apply(self._init_weights)

    @staticmethod
    def embedding(in_chans: int, dim: int) -> nn.Module:
        return NormedPatchEmbed(in_chans, dim, PATCH)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling if `global_pool` is given."""
        self.num_classes = num_classes
        like = self.stem.proj.weight
        self.head.reset(num_classes, global_pool, device=like.device, dtype=like.dtype)
        self.head_hidden_size = self.head.num_features

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to a quarter of the sides, (B, H / 4, W / 4, embed_dim)."""
        return self.stem(x.contiguous(memory_format=torch.channels_last))


AUTHORS_NAMES = {
    "patch_embed.": "stem.",
    "layers.": "stages.",
    ".attn.qkv.": ".mixer.in_proj.",
    ".attn.proj.": ".mixer.out_proj.",
    ".attn.dwc.": ".mixer.local.",
    ".attn.": ".mixer.",
}
# Buffers that older code saved: functions of the window's size.
BUFFERS = ("relative_position_index", "attn_mask")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of Microsoft's Swin, timm's, Agent-Swin's, or ours, under our names.

    Position biases for another window are interpolated.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = unwrap(state_dict)
    if "layers.0.blocks.0.norm1.weight" in state_dict:
        # The authors end a stage with the merging that timm, and we, begin the next with.
        late = "layers.0.downsample.norm.weight" in state_dict
        state_dict = {
            _our_name(name, late): value
            for name, value in state_dict.items()
            if not name.endswith(BUFFERS)
        }
    state_dict = fit_tables(state_dict, model)
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str, late: bool) -> str:
    name = renamed(name, AUTHORS_NAMES)
    name = re.sub(r"^head\.(?!fc\.)", "head.fc.", name)
    if not late:
        return name
    return re.sub(
        r"^stages\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name
    )
