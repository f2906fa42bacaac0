"""The Pyramid Vision Transformer, version 2 (arXiv:2106.13797): overlapping patches, no positions.

In place of position embeddings, the feed-forward networks convolve their hidden width.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..activations import ActLayer
from ..blocks import BlockLayers, MlpLayer
from ..checkpoint import check_model, convert_mixers, rename, unwrap
from ..initialization import init_convolutions, init_linear_layers
from ..layers import PatchDownsample, PatchEmbed
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..mlps import DepthwiseMlp
from ..norms import LayerNorm, NormLayer, resolve_norm_layer
from .base import (
    Head,
    HierarchicalVisionTransformer,
    Stage,
    build_blocks,
    embed_dims,
    image_size,
    stage_sizes,
)


class PyramidVisionTransformerV2(HierarchicalVisionTransformer):
    """Four stages at strides 4, 8, 16 and 32, each of patches, transformer blocks and a norm.

    Every size runs.

    Args:
        img_size: (H, W) or side of the images that the mixers' tables are made for.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for no pooling.
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
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = embed_dims(embed_dim, len(depths))
        patch_norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=1e-5))
        stage_norm = resolve_norm_layer(norm_layer, LayerNorm)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = PatchEmbed(in_chans, dims[0], 7, stride=4, padding=3, norm_layer=patch_norm)
        layers = {
            "norm_layer": norm_layer,
            "act_layer": act_layer,
            "mlp_layer": DepthwiseMlp if mlp_layer is None else mlp_layer,
        }
        stages = build_blocks(
            dims,
            stage_sizes(image_size(img_size), len(dims)),
            depths=depths,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            block=block,
            drop_path_rate=drop_path_rate,
            options=lambda i: layers | {"mlp_ratio": mlp_ratios[i]},
            fan_out=True,
        )
        self.set_stages(
            [
                Stage(
                    PatchDownsample(
                        dims[i - 1], dims[i], 3, stride=2, padding=1, norm_layer=patch_norm
                    )
                    if i
                    else nn.Identity(),
                    blocks,
                    norm=stage_norm(dims[i]),
                )
                for i, blocks in enumerate(stages)
            ],
            dims,
        )
        self.norm = nn.Identity()
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, class_token=False)
        init_linear_layers(self, skip=TokenMixer)
        init_convolutions(self, skip=TokenMixer)


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: HierarchicalVisionTransformer
) -> dict[str, Tensor]:
    """A checkpoint under this library's names.

    It may be one of PVTv2's authors, of timm's, of a mixer's authors in this body, or of this
    library.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "patch_embed1.proj.weight" in state_dict or "patch_embed.proj.weight" in state_dict:
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    state_dict = convert_mixers(state_dict, model)
    check_model(state_dict, model)
    return state_dict


# The authors' names, and timm's.
NAMES = {
    ".attn.": ".mixer.",
    "patch_embed1.": "stem.",
    "patch_embed.": "stem.",
    "head.": "head.fc.",
    ".mlp.dwconv.dwconv.": ".mlp.depthwise.",
    ".mlp.dwconv.": ".mlp.depthwise.",
}


def _our_name(name: str) -> str:
    part = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}
    return re.sub(
        rf"^({'|'.join(part)})(\d)",
        lambda found: f"stages.{int(found[2]) - 1}.{part[found[1]]}",
        rename(name, NAMES),
    )
