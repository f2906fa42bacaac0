"""The Pyramid Vision Transformer, version 1 (arXiv:2102.12122): four stages of patches."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..checkpoint import check_fit, resize_position, unwrap
from ..layers import LayerNorm, TransformerBlock, checked_image
from ..mixers import MixerNames, MixerOptions, Place, build_mixer, mixers_by_block
from ..mixers.agent import pack_tables, resize_tables
from .hierarchy import HierarchicalVisionTransformer


class PatchEmbed(nn.Module):
    """Projected, normed patches of an image or map, (B, C, H, W) to (B, H / P, W / P, C)."""

    def __init__(self, in_dim: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, patch_size, stride=patch_size)
        self.norm = LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(checked_image(x, self.proj.in_channels, self.proj.stride[0]))
        return self.norm(x.permute(0, 2, 3, 1))


class PvtStage(nn.Module):
    """Position embedding and blocks, after a patch embedding (but in the first stage)."""

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        size: tuple[int, int],
        mixers: Sequence[nn.Module],
        mlp_ratio: float,
        drop_paths: Sequence[float],
        class_token: bool,
    ) -> None:
        super().__init__()
        self.size = size
        self.grad_checkpointing = False
        self.prefix_tokens = int(class_token)
        self.embed = nn.Identity() if in_dim is None else PatchEmbed(in_dim, dim, 2)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        tokens = self.prefix_tokens + size[0] * size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, mixer, mlp_ratio, rate)
            for mixer, rate in zip(mixers, drop_paths, strict=True)
        )

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """A map (B, H, W, C) to tokens (B, P + H' * W', C'), and (H', W')."""
        if isinstance(self.embed, PatchEmbed):
            x = self.embed(x.permute(0, 3, 1, 2))
        size = x.shape[1:3]
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), 1)
        position = resample_abs_pos_embed(
            self.pos_embed, size, self.size, self.prefix_tokens, "bilinear", antialias=False
        )
        x = x + position.to(x.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
        return x, size

    def to_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, H, W, C) of tokens."""
        return x[:, self.prefix_tokens :].unflatten(1, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_map(*self.forward_tokens(x))


class PvtHead(nn.Module):
    """Pooling and classifier, from a map (B, H, W, C) or from tokens with a class token."""

    def __init__(
        self, dim: int, num_classes: int, pool_type: str, drop_rate: float, class_token: bool
    ) -> None:
        super().__init__()
        self.num_features = dim
        self.class_token = class_token
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self._set_pool(pool_type)

    def _set_pool(self, pool_type: str) -> None:
        self.pool_type = pool_type
        if not self.class_token:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC"
            )

    def reset(self, num_classes: int, pool_type: str | None, like: Tensor) -> None:
        """Replace the classifier, and the pooling if `pool_type` is given."""
        if pool_type is not None:
            self._set_pool(pool_type)
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        self.train(self.training)  # new modules start in training mode

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.class_token:
            x = global_pool_nlc(x, self.pool_type, num_prefix_tokens=1)
        else:
            x = self.global_pool(x)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class PyramidVisionTransformerV1(HierarchicalVisionTransformer):
    """Four stages at strides 4, 8, 16 and 32, each of patches, positions and transformer blocks.

    Args:
        img_size: side (or height and width) of the images whose position embeddings are
            learned; every other size interpolates them, and sides that a patch does not divide
            are padded with zeros at the bottom and right.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: timm's pooling name ('token' for the class token); '' for none; by default
            'token' where there is one, else 'avg'.
        dims, depths, num_heads, mlp_ratios: width, blocks, heads and hidden width of the
            feed-forward network over its width, of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one a stage, or
            within a stage one a block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry a stage.
        class_token: a class token in the last stage and a final norm, as in the original;
            features are then tokens (B, 1 + H * W, C) with it, where else they are a map.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: for an unknown mixer, or one that takes no class token where there is one.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        *,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int],
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        class_token: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.class_token = class_token
        self.output_fmt = "NLC" if class_token else "NHWC"
        self.stem = PatchEmbed(in_chans, dims[0], 4)
        names = mixers_by_block(mixer, depths)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.stages = nn.ModuleList()
        self.feature_info = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            reduction = 4 * 2**i
            size = tuple(-(-side // reduction) for side in to_2tuple(img_size or 224))
            prefix = int(class_token and i == len(dims) - 1)
            mixers = [
                build_mixer(name, Place(dim, heads, size, i, j, prefix), mixer_options)
                for j, name in enumerate(names[i])
            ]
            self.stages.append(
                PvtStage(
                    dims[i - 1] if i else None,
                    dim,
                    size,
                    mixers,
                    mlp_ratios[i],
                    drop_paths[i],
                    bool(prefix),
                )
            )
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            )
        self.norm = LayerNorm(dims[-1]) if class_token else nn.Identity()
        pool = global_pool if global_pool is not None else "token" if class_token else "avg"
        self.head = PvtHead(dims[-1], num_classes, pool, drop_rate, class_token)
        self.apply(self._init_weights)
        for name, tensor in self.named_parameters():
            if name.endswith(("cls_token", "pos_embed")):
                trunc_normal_(tensor, std=0.02)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Names beyond vectors and biases that weight decay leaves out: positions decay."""
        return {f"stages.{len(self.stages) - 1}.cls_token"} if self.class_token else set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for timm's layer decay."""
        blocks = [
            (r"^stages\.(\d+)\.(?:embed|pos_embed|cls_token)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling if `global_pool` is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, self.stages[0].pos_embed)

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H / 4), ceil(W / 4), dims[0])."""
        return self.stem(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As of every hierarchy; the final features are those of `forward_features`."""
        if not self.class_token:
            return super().forward_intermediates(
                x, indices, norm, stop_early, output_fmt, intermediates_only
            )
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.forward_stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            tokens, size = stage.forward_tokens(x)
            x = stage.to_map(tokens, size)
            if i == len(self.feature_info) - 1:
                tokens = self.norm(tokens)
            if i in take:
                y = stage.to_map(tokens, size) if norm else x
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return tokens if i == len(self.feature_info) - 1 else x, intermediates

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features (B, ceil(H / 32), ceil(W / 32), C), or normed tokens of that map."""
        if not self.class_token:
            return super().forward_features(x)
        x = self.forward_stem(x)
        for stage in self.stages[:-1]:
            x = stage(x)
        return self.norm(self.stages[-1].forward_tokens(x)[0])


AUTHORS_NAMES = {
    ".attn.qkv.": ".mixer.in_proj.",
    ".attn.proj.": ".mixer.out_proj.",
    ".attn.dwc.": ".mixer.local.",
    ".attn.sr.": ".mixer.reduce.",
    ".attn.q.": ".mixer.query.",
    ".attn.kv.": ".mixer.key_value.",
    ".attn.": ".mixer.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of PVT's or Agent Attention's authors, or of this library, under our names.

    Position embeddings and agents' tables of another image size are interpolated.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = unwrap(state_dict)
    if "patch_embed1.proj.weight" in state_dict:
        state_dict = _our_names(pack_tables(_packed(state_dict)))
    state_dict = resize_tables(
        state_dict, {name: value.shape for name, value in model.state_dict().items()}
    )
    for i, stage in enumerate(model.stages):
        if (position := state_dict.get(name := f"stages.{i}.pos_embed")) is not None:
            state_dict[name] = resize_position(position, stage.size, stage.prefix_tokens)
    config = model.pretrained_cfg
    check_fit(
        state_dict,
        model,
        f"the checkpoint is not of {config['architecture']}",
        # timm adapts the classifier to the classes and the first convolution to the channels.
        ignore=(f"{config['classifier']}.", f"{config['first_conv']}."),
    )
    return state_dict


def _packed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """q and kv in one, but where a reduced map has its own keys and values."""
    packed = {}
    for name, value in state_dict.items():
        mixer, _, part = name.partition(".attn.")
        projection, _, kind = part.partition(".")
        reduced = f"{mixer}.attn.sr.weight" in state_dict
        if projection == "q" and not reduced:
            pair = (value, state_dict[f"{mixer}.attn.kv.{kind}"])
            packed[f"{mixer}.attn.qkv.{kind}"] = torch.cat(pair)
        elif projection != "kv" or reduced:
            packed[name] = value
    return packed


def _our_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = re.compile("|".join(map(re.escape, AUTHORS_NAMES)))

    def ours(name: str) -> str:
        name = theirs.sub(lambda found: AUTHORS_NAMES[found[0]], name)
        name = name.replace("patch_embed1.", "stem.").replace("head.", "head.fc.")
        if name == "cls_token":
            return "stages.3.cls_token"
        part = {"patch_embed": "embed", "pos_embed": "pos_embed", "block": "blocks"}
        return re.sub(
            rf"^({'|'.join(part)})(\d)",
            lambda found: f"stages.{int(found[2]) - 1}.{part[found[1]]}",
            name,
        )

    return {ours(name): value for name, value in state_dict.items()}
