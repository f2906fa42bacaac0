"""The four-stage pyramid of SOFT: blocks that end in a norm, and a class token in the last stage.

Stages 1 to 3 normalise after each residual sum, the last before each branch; position
embeddings are added where a stage begins.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    Mlp,
    calculate_drop_path_rates,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
    to_ntuple,
    trunc_normal_,
)
from timm.models import checkpoint
from torch import Tensor, nn

from ..checkpoint import check_fit, unwrap
from ..layers import AddLayerNorm, ConvNorm, LayerNorm, TransformerBlock
from ..mixers import MixerNames, MixerOptions, Place, build_mixer, mixers_by_block
from .hierarchy import HierarchicalVisionTransformer
from .pyramid import REDUCTION, Stem

STEM_WIDTH = 32
POOLS = ("", "token", "avg", "max", "avgmax")


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
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=lambda: nn.GELU("tanh"))
        self.norm2 = AddLayerNorm(dim, eps=1e-5)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.norm1(x, self.drop(self.mixer(x, size)))[1]
        return self.norm2(x, self.drop(self.mlp(x)))[1]


class PostNormStage(nn.Module):
    """Downsampling (but in the first stage), position embeddings, a class token, blocks.

    With a class token it gives tokens (B, 1 + H * W, C), without one a map (B, H, W, C).
    """

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        size: tuple[int, int],
        block: type[nn.Module],
        mixers: Sequence[nn.Module],
        drops: Sequence[float],
        mlp_ratio: float,
        class_token: bool,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.size = size
        self.downsample = (
            nn.Identity() if in_dim is None else nn.Sequential(ConvNorm(in_dim, dim), nn.ReLU())
        )
        self.prefix_tokens = int(class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        tokens = self.prefix_tokens + size[0] * size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.blocks = nn.ModuleList(
            block(dim, mixer, mlp_ratio, drop) for mixer, drop in zip(mixers, drops, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        size = x.shape[1:3]
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
        position = resample_abs_pos_embed(
            self.pos_embed, size, self.size, self.prefix_tokens, "bilinear", antialias=False
        )
        x = x + position.to(x.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
        return x.unflatten(1, size) if self.cls_token is None else x


class TokenHead(nn.Module):
    """Pooling and classifier, from tokens (B, 1 + N, C) of which the first is the class token."""

    def __init__(self, dim: int, num_classes: int, pool_type: str, drop_rate: float) -> None:
        super().__init__()
        self.num_features = dim
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.set_pooling(pool_type)

    def set_pooling(self, pool_type: str) -> None:
        """Choose the pooling.

        Raises:
            ValueError: if there is no such pooling.
        """
        if pool_type not in POOLS:
            raise ValueError(f"global_pool is {pool_type!r}, expected one of {POOLS}")
        self.pool_type = pool_type

    def reset(self, num_classes: int, pool_type: str | None, like: Tensor) -> None:
        """Replace the classifier, by one like `like` in device and dtype, and the pooling if
        `pool_type` is given."""
        if pool_type is not None:
            self.set_pooling(pool_type)
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        self.train(self.training)  # new modules start in training mode

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(global_pool_nlc(x, self.pool_type, num_prefix_tokens=1))
        return x if pre_logits else self.fc(x)


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
            self.stages.append(
                PostNormStage(
                    dims[i - 1] if i else None,
                    dim,
                    size,
                    TransformerBlock if last else PostNormBlock,
                    mixers,
                    drops[i],
                    mlp_ratio,
                    class_token=last,
                )
            )
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            )
        self.norm = LayerNorm(dims[-1])
        self.head = TokenHead(dims[-1], num_classes, global_pool, drop_rate)
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

    def no_weight_decay(self) -> set[str]:
        """The class token; position embeddings decay, as the authors'."""
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for timm's layer decay."""
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|pos_embed|cls_token)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling if `global_pool` is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, like=self.stem[0].weight)

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H / 4), ceil(W / 4), dims[0])."""
        return self.stem(x)

    def to_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Without the class token, which the last stage's tokens begin with."""
        return x if x.ndim == 4 else x[:, 1:].unflatten(1, size)


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
    for i, stage in enumerate(model.stages):
        position = state_dict.get(name := f"stages.{i}.pos_embed")
        if position is not None and position.shape[1] != stage.pos_embed.shape[1]:
            # Square at the size of the images that it was made for.
            state_dict[name] = resample_abs_pos_embed(
                position, stage.size, None, stage.prefix_tokens, "bilinear", antialias=False
            )
    config = model.pretrained_cfg
    check_fit(
        state_dict,
        model,
        f"the checkpoint is not of {config['architecture']}",
        # timm adapts the classifier to the classes and the first convolution to the channels.
        ignore=(f"{config['classifier']}.", f"{config['first_conv']}."),
    )
    return state_dict


def _our_name(name: str) -> str:
    if name.startswith(AUTHORS_STEM):
        return "stem." + name[len(AUTHORS_STEM) :]
    if name.startswith("head."):
        return "head.fc." + name[len("head.") :]
    if name == "cls_token":
        return "stages.3.cls_token"
    for theirs, ours in AUTHORS_NAMES.items():
        name = name.replace(theirs, ours)
    name = re.sub(
        r"^patch_embed(\d)\.proj\.(\d)\.",
        lambda m: f"stages.{int(m[1]) - 1}.downsample.0.{'norm' if int(m[2]) else 'conv'}.",
        name,
    )
    name = re.sub(r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed", name)
    return re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", name)
