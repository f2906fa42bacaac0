"""The Visual Attention Network's body (arXiv:2202.09741): four stages with batch norms."""

import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..activations import ActLayer
from ..blocks import Block, BlockLayers, MlpLayer, make_drop_path, make_mlp
from ..checkpoint import check_model, convert_mixers, rename, unwrap
from ..context import Context
from ..initialization import init_as_convolution, init_convolutions, init_linear_layers
from ..layers import (
    BatchNormAct2d,
    ConvNormAct,
    Downsample,
    add_residual,
    batch_norm_affine,
    check_image,
    drop_images,
)
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..mixers.projected import ProjectedMixer
from ..mlps import DepthwiseMlp
from ..norms import LayerNorm, NormLayer, is_plain, resolve_norm_layer
from .base import (
    Head,
    HierarchicalVisionTransformer,
    Stage,
    build_blocks,
    embed_dims,
    image_size,
    stage_sizes,
)

HEAD_DIM = 32


class Stem(nn.Module):
    """A convolution of 7 x 7 pixels and stride 4: an image (B, C, H, W) to a map (B, H', W', dim).

    Args:
        in_chans: channels of the images.
        dim: channels of the result.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.embed = ConvNormAct(in_chans, dim, 7, stride=4, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(check_image(x, self.in_chans)).permute(0, 2, 3, 1)


class VANBlock(Block):
    """VAN's block: u = norm1(x), x <- x + gamma1 (mixer(u) + u); x <- x + gamma2 mlp(norm2(x)).

    Args:
        dim: channels C.
        mixer: the token mixer, called `mixer(u, context)`.
        mlp_ratio: hidden width of the feed-forward network over its width.
        drop_path: rate of stochastic depth of both branches.
        layer_scale: initial value of the layer scales of both branches, or None for no scales.
        norm_layer, act_layer, mlp_layer: a class, a partial of one or a name, or None for a batch
            norm, GELU and `DepthwiseMlp`. A batch norm is given maps (B, C, H, W).
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-2,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
    ) -> None:
        super().__init__()
        make_norm = resolve_norm_layer(norm_layer, BatchNormAct2d)
        self.norm1 = make_norm(dim)
        self.mixer = mixer
        self.drop_path1 = make_drop_path(drop_path)
        self.norm2 = make_norm(dim)
        self.norms_take_maps = isinstance(self.norm1, nn.modules.batchnorm._BatchNorm)
        self.mlp = make_mlp(mlp_layer, DepthwiseMlp, dim, int(mlp_ratio * dim), act_layer)
        self.drop_path2 = make_drop_path(drop_path)
        for name in ("gamma1", "gamma2"):
            # Vectors, because they do not decay in the authors' code.
            scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, scale)
        # What `fuse()` multiplies the stream by, in the place of the first norm and the shortcut.
        self.register_buffer("stream_scale", None)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, H * W, C) of the map of `context` to tokens of the same shape."""
        if self.stream_scale is None:
            u = self.normalize(self.norm1, x, context)
            branch, keep = drop_images(self.drop_path1, self.mix(u, x, context) + u)
            x = add_residual(x, branch, self.gamma1, keep)
        else:
            branch = self.drop_path1(self.mix(self.norm1(x), x, context))
            x = add_residual(branch, x, self.stream_scale)
        u = self.normalize(self.norm2, x, context)
        branch, keep = drop_images(self.drop_path2, self.feed_forward(u, context))
        return add_residual(x, branch, self.gamma2, keep)

    def normalize(self, norm: nn.Module, x: Tensor, context: Context) -> Tensor:
        """norm(x) of tokens (B, H * W, C), which a batch norm takes as a map (B, C, H, W)."""
        if not self.norms_take_maps:
            return norm(x)
        image = context.as_map(x, "a batch norm").permute(0, 3, 1, 2)
        return norm(image).permute(0, 2, 3, 1).flatten(1, 2)

    def fuse(self) -> nn.Module:
        """This block, with its batch norms and layer scales multiplied into linear layers.

        With norm1(x) = s x + t, x + gamma1 (out_proj(y) + norm1(x)) is a scaled stream and a linear
        layer, (1 + gamma1 s) x + gamma1 (out_proj(y) + t).
        """
        kept = None
        if type(self.norm1) is BatchNormAct2d and is_projected(self.mixer):
            scale, shift = batch_norm_affine(self.norm1)
            absorb_affine(self.mixer.in_proj, scale, shift)
            with torch.no_grad():
                self.mixer.out_proj.bias.add_(shift)
                self.stream_scale = 1 + (scale if self.gamma1 is None else scale * self.gamma1)
            self.norm1 = nn.Identity()
        else:
            # The shortcut is scaled, too, so that no layer of the mixer can take the scale.
            kept, self.gamma1 = self.gamma1, None
        fc1 = getattr(self.mlp, "fc1", None)
        if type(self.norm2) is BatchNormAct2d and is_plain(fc1):
            absorb_affine(fc1, *batch_norm_affine(self.norm2))
            self.norm2 = nn.Identity()
        super().fuse()
        if kept is not None:
            self.gamma1 = kept
        return self


def is_projected(mixer: nn.Module) -> TypeGuard[ProjectedMixer]:
    """Whether linear layers alone take a mixer's input and give its output, without padding."""
    return (
        isinstance(mixer, ProjectedMixer)
        and type(mixer).forward is ProjectedMixer.forward
        and is_plain(mixer.in_proj)
        and is_plain(mixer.out_proj)
    )


def absorb_affine(linear: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Change a layer so that its output for x is what it was for scale * x + shift."""
    with torch.no_grad():
        linear.bias.add_(linear.weight @ shift)
        linear.weight.mul_(scale)


class VAN(HierarchicalVisionTransformer):
    """Four stages at strides 4, 8, 16 and 32, each of a convolution, blocks and a norm.

    Every size runs.

    Args:
        img_size: (H, W) or side of the images that the mixers' tables are made for.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for no pooling.
        embed_dim: width of each stage; a number is the first stage's, and each stage doubles it.
        depths, mlp_ratios: blocks, and hidden width of the feed-forward network over its width, of
            each stage.
        num_heads: heads of each stage, for mixers that have heads; by default of 32 channels.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one per stage, or
            within a stage one per block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry per stage.
        block: the block (`linsight.backbones.blocks`), a class, a partial of one or a name: one,
            one per stage, or within a stage one per depth. None stands for `VANBlock`.
        norm_layer, act_layer, mlp_layer: the layers of the blocks: a class, a partial of one or a
            name, or None for the authors' own.
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
        num_heads: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        block: BlockLayers | None = None,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = embed_dims(embed_dim, len(depths))
        heads = [dim // HEAD_DIM for dim in dims] if num_heads is None else num_heads
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = Stem(in_chans, dims[0])
        layers = {"norm_layer": norm_layer, "act_layer": act_layer, "mlp_layer": mlp_layer}
        stages = build_blocks(
            dims,
            stage_sizes(image_size(img_size), len(dims)),
            depths=depths,
            num_heads=heads,
            mixer=mixer,
            mixer_options=mixer_options,
            block=VANBlock if block is None else block,
            drop_path_rate=drop_path_rate,
            options=lambda i: layers | {"mlp_ratio": mlp_ratios[i]},
            fan_out=True,
        )
        self.set_stages(
            [
                Stage(
                    Downsample(dims[i - 1], dims[i]) if i else nn.Identity(),
                    blocks,
                    norm=LayerNorm(dims[i]),
                )
                for i, blocks in enumerate(stages)
            ],
            dims,
        )
        self.norm = nn.Identity()
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, class_token=False)
        init_linear_layers(self, skip=TokenMixer)
        init_convolutions(self, skip=TokenMixer)
        for network in self.modules():
            if isinstance(network, DepthwiseMlp):
                # The authors' layers are convolutions of 1 x 1.
                init_as_convolution(network.fc1)
                init_as_convolution(network.fc2)


AUTHORS_NAMES = {
    "patch_embed1.proj.": "stem.embed.conv.",
    "patch_embed1.norm.": "stem.embed.norm.",
    ".attn.": ".mixer.",
    ".dwconv.dwconv.": ".depthwise.",
    ".layer_scale_": ".gamma",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VAN) -> dict[str, Tensor]:
    """A checkpoint under this library's names and in its shapes.

    It may be one of VAN's authors, or of this library.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "patch_embed1.proj.weight" in state_dict:
        state_dict = {
            # The authors' convolutions of 1 x 1 are linear layers here.
            _our_name(name): value.flatten(1) if ".mlp.fc" in name and value.ndim == 4 else value
            for name, value in state_dict.items()
        }
    state_dict = convert_mixers(state_dict, model)
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    name = rename(name, AUTHORS_NAMES)
    name = re.sub(r"^head\.", "head.fc.", name)
    name = re.sub(
        r"^patch_embed(\d)\.(proj|norm)\.",
        lambda m: f"stages.{int(m[1]) - 1}.downsample.{'conv' if m[2] == 'proj' else 'norm'}.",
        name,
    )
    name = re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", name)
    return re.sub(r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm.", name)
