"""The four-stage body of Twins-SVT (arXiv:2104.13840): patches, blocks, conditional positions."""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..activations import ActLayer
from ..blocks import BlockLayers, MlpLayer
from ..checkpoint import check_model, convert_mixers, rename, unwrap
from ..context import Context
from ..initialization import init_convolutions, init_linear_layers
from ..layers import PatchDownsample, PatchEmbed, ResidualDepthwise
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..norms import LayerNorm, NormLayer, resolve_norm_layer
from .base import (
    Head,
    HierarchicalVisionTransformer,
    Stage,
    build_blocks,
    embed_dims,
    image_size,
    run_block,
    stage_sizes,
)


class TwinsStage(Stage):
    """A `Stage` whose first block is followed by a depthwise convolution, x + conv(x).

    Args:
        downsample, blocks, dim: as in `Stage`; without blocks there is no convolution.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], dim: int) -> None:
        super().__init__(downsample, blocks)
        self.position = ResidualDepthwise(dim, 3) if len(self.blocks) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        context = Context((x.shape[1], x.shape[2]))
        for i, block in enumerate(self.blocks):
            x = run_block(block, x.flatten(1, 2), context, self.grad_checkpointing)
            x = x.unflatten(1, context.size)
            if i == 0:
                x = self.position(x)
        return x


class Twins(HierarchicalVisionTransformer):
    """Four stages at strides 4, 8, 16 and 32, final norm, mean, head.

    Every size runs: images and maps that a patch does not divide are padded with zeros at the
    bottom and right.

    Args:
        img_size: (H, W) or side of the images that the mixers' tables are made for.
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
        block: BlockLayers = "transformer",
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = embed_dims(embed_dim, len(depths))
        patch_norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=1e-5))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = PatchEmbed(in_chans, dims[0], 4, norm_layer=patch_norm)
        layers = {
            "mlp_ratio": mlp_ratio,
            "norm_layer": norm_layer,
            "act_layer": act_layer,
            "mlp_layer": mlp_layer,
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
            options=lambda _: layers,
            fan_out=True,
        )
        self.set_stages(
            [
                TwinsStage(
                    PatchDownsample(dims[i - 1], dims[i], 2, norm_layer=patch_norm)
                    if i
                    else nn.Identity(),
                    blocks,
                    dims[i],
                )
                for i, blocks in enumerate(stages)
            ],
            dims,
        )
        self.norm = resolve_norm_layer(norm_layer, LayerNorm)(dims[-1])
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, class_token=False)
        init_linear_layers(self, skip=TokenMixer)
        init_convolutions(self, skip=TokenMixer)

    def no_weight_decay(self) -> set[str]:
        """What mixers ask for, and the convolutions of positions."""
        positions = {n for n, _ in self.named_parameters() if ".position." in n}
        return super().no_weight_decay() | positions


AUTHORS_NAMES = {
    ".attn.": ".mixer.",
    "patch_embeds.0.": "stem.",
    "head.": "head.fc.",
    ".proj.0.": ".",
}


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: HierarchicalVisionTransformer
) -> dict[str, Tensor]:
    """A checkpoint under this library's names.

    It may be one of Twins' authors, of timm's, of a mixer's authors in this body, or of this
    library.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "patch_embeds.0.proj.weight" in state_dict:
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    state_dict = convert_mixers(state_dict, model)
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    part = {"patch_embeds": "downsample", "blocks": "blocks", "pos_block": "position"}
    return re.sub(
        rf"^({'|'.join(part)})\.(\d)\.",
        lambda found: f"stages.{found[2]}.{part[found[1]]}.",
        rename(name, AUTHORS_NAMES),
    )
