"""The four-stage pyramid of SOFT: blocks that end in a norm, and a class token in the last stage.

Stages 1 to 3 normalise after each residual sum, the last before each branch; position
embeddings are added where a stage begins.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    to_2tuple,
    to_ntuple,
    trunc_normal_,
)
from torch import Tensor, nn

from ..checkpoint import check_model, renamed, unwrap
from ..layers import AddLayerNorm, ConvNorm, LayerNorm, Mlp, TransformerBlock
from ..mixers import MixerNames, MixerOptions, Place, build_mixer, fit_tables, mixers_by_block
from .hierarchy import Head, HierarchicalVisionTransformer, TokenStage
from .pyramid import REDUCTION, Stem

STEM_WIDTH = 32


def stem(in_channels: int, channels: int) -> Stem:
    """Three 3 x 3 convolutions, batch norms and ReLUs, of strides 2, 1 and 2."""
    layers: list[nn.Module] = []
    for i, o, stride in (
        (in_channels, STEM_WIDTH, 2),
        (STEM_WIDTH, STEM_WIDTH, 1),
        (STEM_WIDTH, channels, 2),
    ):
        layers += [nn.Conv2d(i, o, 3, stride=stride, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return Stem(*layers)


class PostNormBlock(nn.Module):
    """x <- norm1(x + drop(mixer(x))); x <- norm2(x + drop(mlp(x))), drop elementwise."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1 = AddLayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), approximate="tanh")
        self.norm2 = AddLayerNorm(dim, eps=1e-5)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.norm1(x, self.drop(self.mixer(x, size)))[1]
        return self.norm2(x, self.drop(self.mlp(x)))[1]


class PostNormPyramid(HierarchicalVisionTransformer):
    """Stem, four stages at strides 4, 8, 16 and 32, a class token in the last of them.

    Features are tokens (B, 1 + H * W, C) with the class token first; intermediates are maps
    without it.

    Args:
        img_size: gives the position embeddings their size; every size from 32 px runs, for which
            they are interpolated bilinearly.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: 'token' (the class token), 'avg', 'max', 'avgmax', or '' for none.
        dims, depths, num_heads: width, blocks and heads of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one a stage, or
            within a stage one a block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry a stage.
        mlp_ratio: hidden width of the feed-forward network over its width.
        init_std: standard deviation of the truncated normal that the linear layers' weights are
            drawn from, one or one a stage; none for PyTorch's own initialisation.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; it grows linearly from 0. In stages 1 to 3 it is the
            rate of an ordinary dropout, in the last of stochastic depth.

    Raises:
        ValueError: for an unknown mixer or pooling, or an `img_size` below 32.
    """

    output_fmt = "NLC"
    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        mlp_ratio: float = 4.0,
        init_std: float | Sequence[float | None] | None = 0.02,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if img_size is not None and min(to_2tuple(img_size)) < REDUCTION:
            raise ValueError(f"img_size is {img_size}, at least {REDUCTION} is needed")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = stem(in_chans, dims[0])
        names = mixers_by_block(mixer, depths)
        drops = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.stages = nn.ModuleList()
        self.feature_info = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            reduction = 4 * 2**i
            last = i == len(dims) - 1
            size = tuple(-(-side // reduction) for side in to_2tuple(img_size or 224))
            mixers = [
                build_mixer(name, Place(dim, heads, size, i, j, int(last)), mixer_options)
                for j, name in enumerate(names[i])
            ]
            downsample = (
                nn.Sequential(ConvNorm(dims[i - 1], dim), nn.ReLU()) if i else nn.Identity()
            )
            block = TransformerBlock if last else PostNormBlock
            blocks = (
                block(dim, mixer, mlp_ratio, drop)
                for mixer, drop in zip(mixers, drops[i], strict=True)
            )
            self.stages.append(TokenStage(downsample, dim, size, blocks, class_token=last))
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            )
        self.norm = LayerNorm(dims[-1])
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, class_token=True)
        self._init_weights(to_ntuple(len(dims))(init_std))

    def _init_weights(self, init_stds: Sequence[float | None]) -> None:
        for part, std in zip((*self.stages, self.head), (*init_stds, 0.02), strict=True):
            for module in part.modules():
                if isinstance(module, nn.Linear) and std is not None:
                    trunc_normal_(module.weight, std=std)
                    nn.init.zeros_(module.bias)
        for stage in self.stages:
            trunc_normal_(stage.pos_embed, std=0.02)
            if stage.cls_token is not None:
                trunc_normal_(stage.cls_token, std=0.02)


AUTHORS_STEM = "patch_embed1.proj."
AUTHORS_NAMES = {
    ".att.mha.attn.Qlandmark_op.": ".mixer.landmark.",
    ".att.mha.attn.Qnorm_act.0.": ".mixer.landmark_norm.",
    ".att.mha.attn.conv.": ".mixer.local.",
    ".att.mha.ff.": ".mixer.out_proj.",
    ".att.ff1.": ".mlp.fc1.",
    ".att.ff2.": ".mlp.fc2.",
    ".att.norm": ".norm",
    ".attn.proj.": ".mixer.out_proj.",
}
# Our one input projection is these, one after the other.
AUTHORS_PROJECTIONS = {".att.mha.W_q.": ".att.mha.W_v.", ".attn.q.": ".attn.kv."}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of SOFT's authors, or of this library, under our names and shapes.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if f"{AUTHORS_STEM}0.weight" in state_dict:
        for name in list(state_dict):
            for first, second in AUTHORS_PROJECTIONS.items():
                if first in name:
                    rest = state_dict.pop(name.replace(first, second))
                    ours = name.replace(first, ".mixer.in_proj.")
                    state_dict[ours] = torch.cat([state_dict.pop(name), rest])
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    state_dict = fit_tables(state_dict, model)
    for i, stage in enumerate(model.stages):
        position = state_dict.get(name := f"stages.{i}.pos_embed")
        if position is not None and position.shape[1] != stage.pos_embed.shape[1]:
            # Square at the size of the images that it was made for.
            state_dict[name] = resample_abs_pos_embed(
                position, stage.size, None, stage.prefix_tokens, "bilinear", antialias=False
            )
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    if name.startswith(AUTHORS_STEM):
        return "stem." + name[len(AUTHORS_STEM) :]
    if name.startswith("head."):
        return "head.fc." + name[len("head.") :]
    if name == "cls_token":
        return "stages.3.cls_token"
    name = renamed(name, AUTHORS_NAMES)
    name = re.sub(
        r"^patch_embed(\d)\.proj\.(\d)\.",
        lambda m: f"stages.{int(m[1]) - 1}.downsample.0.{'norm' if int(m[2]) else 'conv'}.",
        name,
    )
    name = re.sub(r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed", name)
    return re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", name)
