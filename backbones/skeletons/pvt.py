"""The Pyramid Vision Transformer, version 1 (arXiv:2102.12122): four stages of patches."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..activations import ActLayer
from ..blocks import BlockLayers, MlpLayer
from ..checkpoint import check_model, convert_mixers, rename, resize_position, unwrap
from ..initialization import init_linear_layers
from ..layers import PatchDownsample, PatchEmbed
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..norms import LayerNorm, NormLayer, resolve_norm_layer
from ..unused import UnusedNorm
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


class PyramidVisionTransformer(HierarchicalVisionTransformer):
    """Four stages at strides 4, 8, 16 and 32, each of patches, positions and transformer blocks.

    Args:
        img_size: side (or height and width) of the images whose position embeddings are
            learned; every other size interpolates them, and sides that a patch does not divide
            are padded with zeros at the bottom and right.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: timm's pooling name ('token' for the class token); '' for no pooling; by
            default 'token' if the model has a class token, else 'avg'.
        embed_dim: width of each stage; a number is the first stage's, and each stage doubles it.
        depths, num_heads, mlp_ratios: blocks, heads and hidden width of the feed-forward network
            over its width, of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one per stage, or
            within a stage one per block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry per stage.
        block: the block (`linsight.backbones.blocks`), a class, a partial of one or a name: one,
            one per stage, or within a stage one per depth.
        norm_layer, act_layer, mlp_layer: a class, a partial of one or a name, or None for the
            authors' own.
        class_token: whether the last stage has a class token, and the model a final norm, as in
            the original. Features are then tokens (B, 1 + H * W, C), otherwise a map.
        unused_norm: whether a model without a class token holds a final norm that it does not use.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: for an unknown mixer, block or layer, or for one that takes no class token in
            a model with a class token.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        *,
        embed_dim: int | Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int],
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        block: BlockLayers = "transformer",
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
        class_token: bool = False,
        unused_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = embed_dims(embed_dim, len(depths))
        last = len(dims) - 1
        sizes = stage_sizes(image_size(img_size), len(dims))
        patch_norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=1e-5))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.output_fmt = "NLC" if class_token else "NHWC"
        self.stem = PatchEmbed(in_chans, dims[0], 4, norm_layer=patch_norm)
        layers = {"norm_layer": norm_layer, "act_layer": act_layer, "mlp_layer": mlp_layer}
        stages = build_blocks(
            dims,
            sizes,
            depths=depths,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            block=block,
            drop_path_rate=drop_path_rate,
            options=lambda i: layers | {"mlp_ratio": mlp_ratios[i]},
            prefix_tokens=(0,) * last + (int(class_token),),
        )
        self.set_stages(
            [
                Stage(
                    PatchDownsample(dims[i - 1], dims[i], 2, norm_layer=patch_norm)
                    if i
                    else nn.Identity(),
                    blocks,
                    dim=dims[i],
                    size=sizes[i],
                    class_token=class_token and i == last,
                )
                for i, blocks in enumerate(stages)
            ],
            dims,
        )
        make_norm = resolve_norm_layer(norm_layer, LayerNorm)
        if class_token:
            self.norm = make_norm(dims[-1])
        else:
            self.norm = UnusedNorm(dims[-1]) if unused_norm else nn.Identity()
        pool = global_pool if global_pool is not None else "token" if class_token else "avg"
        self.head = Head(dims[-1], num_classes, pool, drop_rate, class_token)
        init_linear_layers(self, skip=TokenMixer)
        init_tokens(self, partial(trunc_normal_, std=0.02))


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: PyramidVisionTransformer
) -> dict[str, Tensor]:
    """A checkpoint under this library's names.

    It may be one of PVT's authors, of a mixer's authors in this body, or of this library.
    Position embeddings and tables of another image size are interpolated. A model without a class
    token leaves out what belongs to it: the token, its position and the final norm.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "patch_embed1.proj.weight" in state_dict:
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    if "stages.3.cls_token" in state_dict and model.output_fmt != "NLC":
        leave = ("stages.3.cls_token", "norm.weight", "norm.bias")
        state_dict = {name: value for name, value in state_dict.items() if name not in leave}
        state_dict["stages.3.pos_embed"] = state_dict["stages.3.pos_embed"][:, 1:]
    state_dict = convert_mixers(state_dict, model)
    for i, stage in enumerate(model.stages):
        if (position := state_dict.get(name := f"stages.{i}.pos_embed")) is not None:
            state_dict[name] = resize_position(position, stage.size, stage.prefix_tokens)
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    name = rename(name, {".attn.": ".mixer.", "patch_embed1.": "stem.", "head.": "head.fc."})
    if name == "cls_token":
        return "stages.3.cls_token"
    part = {"patch_embed": "downsample", "pos_embed": "pos_embed", "block": "blocks"}
    return re.sub(
        rf"^({'|'.join(part)})(\d)",
        lambda found: f"stages.{int(found[2]) - 1}.{part[found[1]]}",
        name,
    )
