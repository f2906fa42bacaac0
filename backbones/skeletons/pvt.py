"""The Pyramid Vision Transformer, version 1 (arXiv:2102.12122): four stages of patches."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    calculate_drop_path_rates,
    to_2tuple,
    trunc_normal_,
)
from torch import Tensor, nn

from ..checkpoint import check_model, renamed, resize_position, unwrap
from ..layers import LayerNorm, NormedPatchEmbed, TransformerBlock
from ..mixers import (
    MixerNames,
    MixerOptions,
    Place,
    build_mixer,
    fit_tables,
    mixers_by_block,
)
from .hierarchy import Head, HierarchicalVisionTransformer, TokenStage


class PatchDownsample(NormedPatchEmbed):
    """`NormedPatchEmbed` of a map, (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


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
        self.output_fmt = "NLC" if class_token else "NHWC"
        self.stem = NormedPatchEmbed(in_chans, dims[0], 4)
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
            downsample = PatchDownsample(dims[i - 1], dim, 2) if i else nn.Identity()
            blocks = (
                TransformerBlock(dim, mixer, mlp_ratios[i], rate)
                for mixer, rate in zip(mixers, drop_paths[i], strict=True)
            )
            self.stages.append(TokenStage(downsample, dim, size, blocks, bool(prefix)))
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            )
        self.norm = LayerNorm(dims[-1]) if class_token else nn.Identity()
        pool = global_pool if global_pool is not None else "token" if class_token else "avg"
        self.head = Head(dims[-1], num_classes, pool, drop_rate, class_token)
        self.apply(self._init_weights)
        for name, tensor in self.named_parameters():
            if name.endswith(("cls_token", "pos_embed")):
                trunc_normal_(tensor, std=0.02)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


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
        state_dict = _our_names(_packed(state_dict))
    state_dict = fit_tables(state_dict, model)
    for i, stage in enumerate(model.stages):
        if (position := state_dict.get(name := f"stages.{i}.pos_embed")) is not None:
            state_dict[name] = resize_position(position, stage.size, stage.prefix_tokens)
    check_model(state_dict, model)
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
    def ours(name: str) -> str:
        name = renamed(name, AUTHORS_NAMES)
        name = name.replace("patch_embed1.", "stem.").replace("head.", "head.fc.")
        if name == "cls_token":
            return "stages.3.cls_token"
        part = {"patch_embed": "downsample", "pos_embed": "pos_embed", "block": "blocks"}
        return re.sub(
            rf"^({'|'.join(part)})(\d)",
            lambda found: f"stages.{int(found[2]) - 1}.{part[found[1]]}",
            name,
        )

    return {ours(name): value for name, value in state_dict.items()}
