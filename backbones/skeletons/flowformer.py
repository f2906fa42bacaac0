"""The four-stage body of Flowformer (arXiv:2202.06258), with position embeddings once."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..activations import ActLayer
from ..blocks import BlockLayers, MlpLayer, TransformerBlock
from ..checkpoint import check_model, convert_mixers, rename, resize_position, unwrap
from ..initialization import init_linear_layers
from ..layers import PatchDownsample, PatchEmbed
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..norms import LayerNorm, NormLayer, resolve_norm_layer
from .base import (
    Head,
    HierarchicalVisionTransformer,
    Stage,
    build_blocks,
    embed_dims,
    image_size,
    init_tokens,
    stage_sizes,
)


class ScaledMlpBlock(TransformerBlock):
    """`TransformerBlock` whose feed-forward network alone has a layer scale, a vector.

    Args:
        layer_scale: initial value of the layer scale, or None for no scale.
        others: as in `TransformerBlock`.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, *, layer_scale: float | None = 1e-5, **options: Any
    ) -> None:
        super().__init__(dim, mixer, layer_scale=None, **options)
        if layer_scale is not None:
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))


class Flowformer(HierarchicalVisionTransformer):
    """Four stages at strides 4, 8, 16 and 32 of patches without norms, final norm, mean, head.

    Args:
        img_size: side (or height and width) of the images whose position embeddings are
            learned; every other size interpolates them, and sides that a patch does not divide
            are padded with zeros at the bottom and right.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for no pooling.
        embed_dim: width of each stage; a number is the first stage's, and each stage doubles it.
        depths, num_heads: blocks and heads of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one per stage, or
            within a stage one per block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry per stage.
        block: the block (`linsight.backbones.blocks`), a class, a partial of one or a name: one,
            one per stage, or within a stage one per depth.
        norm_layer, act_layer, mlp_layer: a class, a partial of one or a name, or None for the
            authors' own.
        mlp_ratio: hidden width of the feed-forward network over its width.
        layer_scale: initial layer scale; None for no layer scales.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: for an unknown mixer, block or layer, or a mixer that cannot stand here.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        embed_dim: int | Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        block: BlockLayers = ScaledMlpBlock,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = embed_dims(embed_dim, len(depths))
        sizes = stage_sizes(image_size(img_size), len(dims))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = PatchEmbed(in_chans, dims[0], 4)
        layers = {
            "mlp_ratio": mlp_ratio,
            "layer_scale": layer_scale,
            "norm_layer": norm_layer,
            "act_layer": act_layer,
            "mlp_layer": mlp_layer,
        }
        stages = build_blocks(
            dims,
            sizes,
            depths=depths,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            block=block,
            drop_path_rate=drop_path_rate,
            options=lambda _: layers,
        )
        self.set_stages(
            [
                Stage(
                    PatchDownsample(dims[i - 1], dims[i], 2) if i else nn.Identity(),
                    blocks,
                    dim=dims[i],
                    size=None if i else sizes[0],
                )
                for i, blocks in enumerate(stages)
            ],
            dims,
        )
        self.norm = resolve_norm_layer(norm_layer, LayerNorm)(dims[-1])
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, class_token=False)
        init_linear_layers(self, skip=TokenMixer)
        init_tokens(self, partial(trunc_normal_, std=0.02))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Flowformer) -> dict[str, Tensor]:
    """A checkpoint under this library's names.

    It may be one of Flowformer's authors or of this library. Position embeddings of another image
    size are interpolated.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "patch_embed.0.proj.weight" in state_dict:
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    state_dict = convert_mixers(state_dict, model)
    if (position := state_dict.get("stages.0.pos_embed")) is not None:
        state_dict["stages.0.pos_embed"] = resize_position(position, model.stages[0].size, 0)
    check_model(state_dict, model)
    return state_dict


AUTHORS_NAMES = {
    ".attn.": ".mixer.",
    ".gamma": ".gamma2",
    "pos_embed": "stages.0.pos_embed",
    "patch_embed.0.": "stem.",
    "head.": "head.fc.",
}


def _our_name(name: str) -> str:
    name = rename(name, AUTHORS_NAMES)
    name = re.sub(r"^blocks\.(\d)\.", r"stages.\1.blocks.", name)
    return re.sub(r"^patch_embed\.(\d)\.", r"stages.\1.downsample.", name)
