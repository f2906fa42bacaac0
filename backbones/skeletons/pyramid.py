"""The four-stage pyramid with a convolutional stem that RAVLT and MAViT share.

Maps travel as (B, H, W, C), contiguous; a mixer sees them as (B, H * W, C), a free view.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    to_2tuple,
    to_ntuple,
    trunc_normal_,
)
from timm.models import checkpoint, register_notrace_function
from torch import Tensor, nn

from ...kernels.rotary import Rotary, rotary_tables
from ..checkpoint import check_model, renamed, unwrap
from ..layers import (
    AddLayerNorm,
    ConvMlp,
    ConvNorm,
    DepthwiseConv2d,
    classifier,
    normalized_conv2d,
)
from ..mixers import MixerNames, MixerOptions, Place, build_mixer, fit_tables, mixers_by_block
from .hierarchy import HierarchicalVisionTransformer

register_notrace_function(rotary_tables)

REDUCTION = 32


@register_notrace_function
def check_image(x: Tensor, in_chans: int) -> None:
    """Raise ValueError for an image that the stem and the downsampling cannot take."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images have shape {tuple(x.shape)}, expected (B, {in_chans}, H, W)")
    if x.shape[2] < REDUCTION or x.shape[3] < REDUCTION:
        raise ValueError(
            f"images are {x.shape[2]} x {x.shape[3]} pixels, at least {REDUCTION} x {REDUCTION} "
            "are needed: the model divides each side by 32; resize or pad them"
        )


ACTIVATIONS = {nn.GELU: "gelu", nn.ReLU: "relu"}


class Stem(nn.Sequential):
    """Convolutions of an image (B, in_chans, H, W) to a map (B, ceil(H / 4), ceil(W / 4), C).

    Its layers are a convolution, a batch norm and an activation in turn; the last may be missing.
    """

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self[0].in_channels)
        for i in range(0, len(self), 3):
            activation = ACTIVATIONS[type(self[i + 2])] if i + 2 < len(self) else None
            x = normalized_conv2d(x, self[i], self[i + 1], activation)
        return x.permute(0, 2, 3, 1)


def stem(in_channels: int, channels: int) -> Stem:
    """Four 3 x 3 convolutions with batch norm, the first and last of stride 2."""
    half = channels // 2
    layers: list[nn.Module] = []
    for i, o, stride in (
        (in_channels, half, 2),
        (half, half, 1),
        (half, half, 1),
        (half, channels, 2),
    ):
        layers += [nn.Conv2d(i, o, 3, stride=stride, padding=1), nn.BatchNorm2d(o), nn.GELU()]
    return Stem(*layers[:-1])


class PyramidBlock(nn.Module):
    """Conditional position, token mixer and feed-forward network, each as a residual.

    x <- x + depthwise(x); x <- x + gamma1 mixer(norm1(x)); x <- x + gamma2 mlp(norm2(x)).
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float,
        layer_scale: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.position = DepthwiseConv2d(dim, 3, residual=True)
        self.norm1 = AddLayerNorm(dim)
        self.mixer = mixer
        self.norm2 = AddLayerNorm(dim)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim))
        # Of rank 4, so that weight decay, which leaves out vectors, acts on them as the authors'.
        self.gamma1 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale))
        self.gamma2 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale))
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, branch: Tensor | None, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Of x + branch, as two such terms: the next block's first kernel adds them."""
        x = self.position(x, branch)
        size = x.shape[1:3]
        x, y = self.norm1(x)
        y = self.mixer(y.flatten(1, 2), size, rotary, self.gamma1).unflatten(1, size)
        x, y = self.norm2(x, self.drop_path1(y))
        return x, self.drop_path2(self.mlp(y, self.gamma2))


class PyramidStage(nn.Module):
    """Downsampling (but in the first stage) and blocks, which share one rotary table."""

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        head_dim: int,
        mixers: Sequence[nn.Module],
        drop_paths: Sequence[float],
        **block: Any,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if in_dim is None else ConvNorm(in_dim, dim)
        self.blocks = nn.ModuleList(
            PyramidBlock(dim, mixer, drop_path=rate, **block)
            for mixer, rate in zip(mixers, drop_paths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        rotary = rotary_tables(x.shape[1:3], self.head_dim, x.dtype, x.device)
        branch = None
        for block in self.blocks:
            run = partial(checkpoint, block) if self.grad_checkpointing else block
            x, branch = run(x, branch, rotary)
        return x + branch


class PyramidHead(nn.Module):
    """Projection, batch norm, SiLU, pooling and classifier, from (B, H, W, C)."""

    def __init__(
        self, dim: int, hidden_dim: int, num_classes: int, pool_type: str, drop_rate: float
    ) -> None:
        super().__init__()
        self.num_features = hidden_dim
        self.projection = nn.Linear(dim, hidden_dim)
        self.norm = nn.BatchNorm2d(hidden_dim)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, self.projection.weight)

    def reset(self, num_classes: int, pool_type: str | None, like: Tensor) -> None:
        """Replace the classifier, by one like `like` in device and dtype, and the pooling if
        `pool_type` is given."""
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC"
            )
        self.fc = classifier(self.num_features, num_classes, like)
        self.train(self.training)  # new modules start in training mode

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(self.projection(x).permute(0, 3, 1, 2))
        x = self.drop(self.global_pool(F.silu(x).permute(0, 2, 3, 1)))
        return x if pre_logits else self.fc(x)


class PyramidVisionTransformer(HierarchicalVisionTransformer):
    """Stem, four stages at strides 4, 8, 16 and 32, and a projecting head.

    Args:
        img_size: accepted as timm's models do and checked; every size from 32 px runs.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        dims, depths, num_heads: width, blocks and heads of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one a stage, or
            within a stage one a block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry a stage.
        mlp_ratio: hidden width of the feed-forward network over its width.
        layer_scale: initial gamma of the residual branches, one or one a stage.
        head_dim: width P of the head's projection.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: for an unknown mixer or an `img_size` below 32.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        mlp_ratio: float = 3.5,
        layer_scale: float | Sequence[float] = 1.0,
        head_dim: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if img_size is not None and min(to_2tuple(img_size)) < REDUCTION:
            raise ValueError(f"img_size is {img_size}, at least {REDUCTION} is needed")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.head_hidden_size = head_dim
        self.stem = stem(in_chans, dims[0])
        names = mixers_by_block(mixer, depths)
        scales = to_ntuple(len(dims))(layer_scale)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.stages = nn.ModuleList()
        self.feature_info = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            reduction = 4 * 2**i
            size = tuple(-(-side // reduction) for side in to_2tuple(img_size or 224))
            mixers = [
                build_mixer(name, Place(dim, heads, size, i, j), mixer_options)
                for j, name in enumerate(names[i])
            ]
            self.stages.append(
                PyramidStage(
                    dims[i - 1] if i else None,
                    dim,
                    dim // heads,
                    mixers,
                    drop_paths[i],
                    mlp_ratio=mlp_ratio,
                    layer_scale=scales[i],
                )
            )
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            )
        self.norm = nn.Identity()
        self.head = PyramidHead(dims[-1], head_dim, num_classes, global_pool, drop_rate)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


AUTHORS_NAMES = {
    "patch_embed.proj.": "stem.",
    "layers.": "stages.",
    ".pos.": ".position.",
    ".norm1.norm.": ".norm1.",
    ".norm2.norm.": ".norm2.",
    ".gamma_1": ".gamma1",
    ".gamma_2": ".gamma2",
    ".attn.qkvo.": ".mixer.in_proj.",
    ".attn.lepe.": ".mixer.local.",
    ".attn.proj.": ".mixer.out_proj.",
    ".ffn.dwconv.": ".mlp.depthwise.",
    ".ffn.": ".mlp.",
    ".downsample.reduction.": ".downsample.conv.",
}
AUTHORS_HEAD = {"proj.": "head.projection.", "norm.": "head.norm.", "head.": "head.fc."}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of RAVLT's or MAViT's authors, or of this library, under our names and shapes.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = unwrap(state_dict)
    if "patch_embed.proj.0.weight" in state_dict:
        state_dict = {
            _our_name(name): value
            for name, value in state_dict.items()
            if not name.endswith(".RoPE.angle")
        }
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state_dict = {
        # 1 x 1 convolutions are linear layers here, and scales stand on the last axis.
        name: value.reshape(shapes[name])
        if name in shapes and value.numel() == shapes[name].numel()
        else value
        for name, value in fit_tables(state_dict, model).items()
    }
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    for theirs, ours in AUTHORS_HEAD.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    name = renamed(name, AUTHORS_NAMES)
    # The authors end a stage with the downsampling that here begins the next.
    return re.sub(
        r"^stages\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name
    )
