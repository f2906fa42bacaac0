"""The four-stage body of Swin (arXiv:2103.14030): patches, blocks and patch merging.

Maps travel as (B, H, W, C), contiguous; a mixer sees them as (B, H * W, C), a view.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..activations import ActLayer
from ..blocks import BlockLayers, MlpLayer
from ..checkpoint import check_model, convert_mixers, rename, unwrap
from ..initialization import init_linear_layers
from ..layers import PatchEmbed, pad_to_multiple
from ..linear import fuse_linear
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..mixers.window import TABLE
from ..norms import LayerNorm, NormLayer, fold_into_linear, resolve_norm_layer
from .base import (
    Head,
    HierarchicalVisionTransformer,
    Stage,
    build_blocks,
    embed_dims,
    image_size,
    stage_sizes,
)

PATCH = 4
EPSILON = 1e-5


class PatchMerging(nn.Module):
    """Four neighbours side by side, normalised and projected: a map to half its sides.

    The neighbours (row, column) are in the order (0, 0), (1, 0), (0, 1), (1, 1).

    Args:
        in_dim, dim: channels before and after.
        norm_layer: a callable that makes the norm of 4 C channels.
    """

    def __init__(self, in_dim: int, dim: int, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.norm = norm_layer(4 * in_dim)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))

    def fuse(self) -> nn.Module:
        """This layer, whose projection has taken in the norm, if that is constant."""
        self.norm = fold_into_linear(self.norm, self.reduction)
        fuse_linear(self)
        return self


class SwinTransformer(HierarchicalVisionTransformer):
    """Patch embedding, four stages at strides 4, 8, 16 and 32, norm, and a pooling head.

    Every size runs: images and maps that a patch or a merging does not divide are padded with
    zeros at the bottom and right.

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

    merging: ClassVar[type[nn.Module]] = PatchMerging
    # Kernel size, stride and padding of the patches' convolution.
    patches: ClassVar[dict[str, int]] = {"kernel_size": PATCH}

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
        make_norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=EPSILON))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = PatchEmbed(in_chans, dims[0], **self.patches, norm_layer=make_norm)
        layers = {
            "mlp_ratio": mlp_ratio,
            "norm_layer": make_norm,
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
        )
        self.set_stages(
            [
                Stage(self.merging(dims[i - 1], dims[i], make_norm) if i else nn.Identity(), blocks)
                for i, blocks in enumerate(stages)
            ],
            dims,
        )
        self.norm = make_norm(dims[-1])
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, class_token=False)
        init_linear_layers(self, skip=TokenMixer)


AUTHORS_NAMES = {"patch_embed.": "stem.", "layers.": "stages.", ".attn.": ".mixer."}


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: HierarchicalVisionTransformer
) -> dict[str, Tensor]:
    """A checkpoint under this library's names.

    It may be one of Microsoft's Swin, of timm's, of a mixer's authors in this body, or of this
    library. Position biases for another window are interpolated.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "layers.0.blocks.0.mlp.fc1.weight" in state_dict:
        # The authors end a stage with the merging that begins the next one in timm, and here.
        late = "layers.0.downsample.reduction.weight" in state_dict
        state_dict = {
            _our_name(name, late): value
            for name, value in state_dict.items()
            # Older code saved this buffer, which depends on the window's size alone.
            if not name.endswith("attn_mask")
        }
        own = model.state_dict().keys()
        placed = {name: name.replace(f".{TABLE}", f".attention.{TABLE}") for name in state_dict}
        state_dict = {
            placed[name] if placed[name] in own else name: value
            for name, value in state_dict.items()
        }
    state_dict = convert_mixers(state_dict, model)
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str, late: bool) -> str:
    name = rename(name, AUTHORS_NAMES)
    name = re.sub(r"^head\.(?!fc\.)", "head.fc.", name)
    if not late:
        return name
    return re.sub(
        r"^stages\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name
    )
