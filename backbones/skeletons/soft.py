"""SOFT's four-stage body (arXiv:2110.11945): post-norm blocks, a class token in the last stage.

Stages 1 to 3 normalise after each residual sum, the last before each branch; position
embeddings are added where a stage begins.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..activations import ActLayer, resolve_act_layer
from ..blocks import BlockLayers, MlpLayer
from ..checkpoint import check_model, convert_mixers, rename, resize_position, unwrap
from ..initialization import init_linear_layers
from ..layers import Downsample
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..norms import LayerNorm, NormLayer, resolve_norm_layer
from .base import (
    Head,
    HierarchicalVisionTransformer,
    Stage,
    build_blocks,
    embed_dims,
    init_tokens,
    stage_sizes,
)
from .ravlt import REDUCTION, Stem

STEM_WIDTH = 32


class SOFT(HierarchicalVisionTransformer):
    """Stem, four stages at strides 4, 8, 16 and 32, a class token in the last of them.

    Features are tokens (B, 1 + H * W, C) with the class token first; intermediates are maps
    without it.

    Args:
        img_size: side (or height and width) of the images whose position embeddings are learned;
            every other size from 32 px interpolates them bilinearly.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: 'token' (the class token), 'avg', 'max', 'avgmax', or '' for no pooling.
        embed_dim: width of each stage; a number is the first stage's, and each stage doubles it.
        depths, num_heads: blocks and heads of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one per stage, or
            within a stage one per block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry per stage.
        block: the block (`linsight.backbones.blocks`), a class, a partial of one or a name: one,
            one per stage, or within a stage one per depth. None stands for post-norm blocks, and
            transformer blocks in the last stage.
        norm_layer, act_layer, mlp_layer: the layers of the blocks; `norm_layer` is the final norm,
            too, and `act_layer` the activation of stem and downsampling: a class, a partial of one
            or a name, or None for the authors' own.
        mlp_ratio: hidden width of the feed-forward network over its width.
        init_std: standard deviation of the truncated normal distribution from which the weights of
            linear layers are drawn, one or one per stage; None for PyTorch's own initialisation.
        drop_rate: dropout before the classifier.
        drop_path_rate: rate of the last block; it grows linearly from 0. In stages 1 to 3 it is
            the rate of an ordinary dropout, in the last stage the rate of stochastic depth.

    Raises:
        ValueError: for an unknown mixer, block, layer or pooling, or an `img_size` below 32.
    """

    output_fmt = "NLC"
    num_prefix_tokens = 1

    least_side = REDUCTION
    # As the authors' code has it.
    position_interpolation = "bilinear"

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        embed_dim: int | Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        block: BlockLayers | None = None,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
        mlp_ratio: float = 4.0,
        init_std: float | Sequence[float | None] | None = 0.02,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = embed_dims(embed_dim, len(depths))
        last = len(dims) - 1
        sizes = stage_sizes(self.check_image_size(img_size), len(dims))
        act = resolve_act_layer(act_layer, nn.ReLU)
        stds = init_std if isinstance(init_std, Sequence) else (init_std,) * len(dims)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = Stem((in_chans, STEM_WIDTH, STEM_WIDTH, dims[0]), (2, 1, 2), act, last_act=True)
        layers = {
            "mlp_ratio": mlp_ratio,
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
            block=("post_norm",) * last + ("transformer",) if block is None else block,
            drop_path_rate=drop_path_rate,
            options=lambda _: layers,
            prefix_tokens=(0,) * last + (1,),
            init_stds=stds,
        )
        self.set_stages(
            [
                Stage(
                    Downsample(dims[i - 1], dims[i], act) if i else nn.Identity(),
                    blocks,
                    dim=dims[i],
                    size=sizes[i],
                    class_token=i == last,
                )
                for i, blocks in enumerate(stages)
            ],
            dims,
        )
        self.norm = resolve_norm_layer(norm_layer, LayerNorm)(dims[-1])
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, class_token=True)
        for part, std in zip((*self.stages, self.head), (*stds, 0.02), strict=True):
            init_linear_layers(part, std, skip=TokenMixer)
        init_tokens(self, partial(trunc_normal_, std=0.02))


AUTHORS_STEM = "patch_embed1.proj."
AUTHORS_NAMES = {
    ".att.mha.": ".mixer.mha.",
    ".att.ff1.": ".mlp.fc1.",
    ".att.ff2.": ".mlp.fc2.",
    ".att.norm": ".norm",
    ".attn.": ".mixer.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SOFT) -> dict[str, Tensor]:
    """A checkpoint under this library's names and in its shapes.

    It may be one of SOFT's authors, or of this library.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if f"{AUTHORS_STEM}0.weight" in state_dict:
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    state_dict = convert_mixers(state_dict, model)
    for i, stage in enumerate(model.stages):
        position = state_dict.get(name := f"stages.{i}.pos_embed")
        if position is not None:
            state_dict[name] = resize_position(
                position,
                stage.size,
                stage.prefix_tokens,
                interpolation=model.position_interpolation,
            )
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    if name.startswith("head."):
        return "head.fc." + name[len("head.") :]
    if name == "cls_token":
        return "stages.3.cls_token"
    # The authors' stem is one sequence of convolutions, batch norms and activations in turn.
    name = re.sub(
        r"^patch_embed1\.proj\.(\d+)\.",
        lambda m: f"stem.{int(m[1]) // 3}.{('conv', 'norm')[int(m[1]) % 3]}.",
        name,
    )
    name = rename(name, AUTHORS_NAMES)
    name = re.sub(
        r"^patch_embed(\d)\.proj\.(\d)\.",
        lambda m: f"stages.{int(m[1]) - 1}.downsample.{'norm' if int(m[2]) else 'conv'}.",
        name,
    )
    name = re.sub(r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed", name)
    return re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", name)
