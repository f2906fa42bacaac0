"""The base of every skeleton: timm's interface, stages of blocks, a head."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, cast

import torch
from timm.layers import (
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    global_pool_nlc,
    is_exporting,
    resample_abs_pos_embed,
)
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...kernels.runtime.rehearsal import announce_pass
from ..blocks import BlockLayers, add_pending, choices_by_depth, may_defer, resolve_block
from ..checkpoint import TimmModel, rename_old_entries, resize_position
from ..context import Context, Place
from ..layers import check_token_pool, make_classifier
from ..linear import convert_weights
from ..mixers import MIXERS, MixerNames, MixerOptions, TokenMixer, build_mixer
from ..resampling import resampling

Size = tuple[int, int]

# PyTorch's own tracer does not know timm's list of functions that depend on sizes.
torch.fx.wrap("resample_abs_pos_embed")


def embed_dims(embed_dim: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """The width of every stage: a number is the first stage's, and each stage doubles it.

    Raises:
        ValueError: if there are not as many widths as stages.
    """
    if isinstance(embed_dim, int):
        return tuple(embed_dim * 2**i for i in range(stages))
    if len(embed_dim) != stages:
        raise ValueError(f"embed_dim names {len(embed_dim)} widths, the model has {stages} stages")
    return tuple(embed_dim)


def build_blocks(
    dims: Sequence[int],
    sizes: Sequence[Size],
    *,
    depths: Sequence[int],
    num_heads: Sequence[int],
    mixer: MixerNames,
    mixer_options: MixerOptions | None,
    block: BlockLayers,
    drop_path_rate: float,
    options: Callable[[int], dict[str, Any]],
    prefix_tokens: Sequence[int] | None = None,
    init_stds: Sequence[float | None] | None = None,
    fan_out: bool = False,
    rotary: bool = False,
) -> list[list[nn.Module]]:
    """The blocks of every stage, each with its mixer.

    Args:
        dims, sizes, depths, num_heads, prefix_tokens, init_stds: for each stage its width, the
            (H, W) of its map at the model's image size, its number of blocks and of heads, its
            class tokens (None stands for no class tokens), and the standard deviation of its
            initial weights (None stands for 0.02).
        mixer, mixer_options: see `linsight.backbones.mixers`.
        block: the block, one for all depths, one per stage or one per depth.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        options: a function from a stage's index to further keyword arguments of its blocks.
        fan_out: how mixers initialise their convolutions, see `Place`.
        rotary: whether positions are rotary, see `Place`.
    """
    mixers = choices_by_depth("mixer", mixer, depths)
    blocks = choices_by_depth("block", block, depths)
    rates = cast(
        list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
    )
    stages = []
    for i, (dim, heads, size) in enumerate(zip(dims, num_heads, sizes, strict=True)):
        prefix = prefix_tokens[i] if prefix_tokens else 0
        std = init_stds[i] if init_stds else 0.02
        stages.append(
            [
                resolve_block(make)(
                    dim,
                    build_mixer(
                        name,
                        Place(dim, heads, size, i, j, prefix, std, fan_out, rotary),
                        mixer_options,
                    ),
                    drop_path=rate,
                    **options(i),
                )
                for j, (make, name, rate) in enumerate(
                    zip(blocks[i], mixers[i], rates[i], strict=True)
                )
            ]
        )
    return stages


def add_tokens(
    x: Tensor,
    cls_token: Tensor | None,
    pos_embed: Tensor | None,
    size: Size | None,
    interpolation: str,
    embed_prefix: bool = True,
) -> tuple[Tensor, Context]:
    """Tokens of a map, with class tokens in front and position embeddings added.

    Args:
        x: the map (B, H, W, C).
        cls_token: the P tokens in front (1, P, C), or None for none.
        pos_embed: (1, P + h * w, C), or (1, h * w, C) without `embed_prefix`, or None.
        size: (h, w), from which position embeddings are interpolated to (H, W), or None if there
            are none.
        interpolation: 'bicubic' or 'bilinear', of the position embeddings.
        embed_prefix: whether the tokens in front have position embeddings.

    Returns:
        Tokens (B, P + H * W, C) and the context of the map.
    """
    prefix = 0 if cls_token is None else cls_token.shape[1]
    context = Context((x.shape[1], x.shape[2]), prefix)
    x = x.flatten(1, 2)
    if pos_embed is not None and not embed_prefix:
        x = add_positions(x, pos_embed, context.size, size, 0, interpolation)
    if cls_token is not None:
        x = torch.cat((cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), 1)
    if pos_embed is not None and embed_prefix:
        x = add_positions(x, pos_embed, context.size, size, prefix, interpolation)
    return x, context


def add_positions(
    x: Tensor, pos_embed: Tensor, size: Size, old: Size | None, prefix: int, interpolation: str
) -> Tensor:
    """Tokens with position embeddings of a map of the size `old`, interpolated to `size`."""
    old, antialias = old or size, interpolation == "bicubic"
    if is_exporting():
        position = _resample(pos_embed, size, old, prefix, interpolation, antialias)
    else:
        position = resample_abs_pos_embed(
            pos_embed, list(size), list(old), prefix, interpolation, antialias
        )
    return x + position.to(x.dtype)


def _resample(
    pos_embed: Tensor, size: Size, old: Size, prefix: int, interpolation: str, antialias: bool
) -> Tensor:
    """timm's `resample_abs_pos_embed`, computed by products alone."""
    tokens, position = pos_embed[:, :prefix], pos_embed[:, prefix:].float()
    mode = "linear" if interpolation == "bilinear" else interpolation
    rows, columns = (
        resampling(*lengths, mode, antialias, position.dtype, position.device)
        for lengths in zip(old, size, strict=True)
    )
    position = columns @ (rows @ position[0].view(old[0], -1)).view(size[0], old[1], -1)
    return torch.cat((tokens, position.view(1, size[0] * size[1], -1).to(tokens.dtype)), 1)


def run_block(block: nn.Module, x: Tensor, context: Context, recompute: bool) -> Tensor:
    """A block's output; if `recompute`, the backward pass computes its activations again."""
    return checkpoint(block, x, context) if recompute else block(x, context)


class Stage(nn.Module):
    """Downsampling, then a class token and position embeddings if there are any, then blocks.

    With a class token the result is tokens (B, 1 + H * W, C), without one a map (B, H, W, C).

    Args:
        downsample: makes this stage's map from the map of the stage before.
        blocks: called with tokens and a `Context`.
        dim: channels C.
        size: (H, W) at the model's image size if the stage has position embeddings; any other
            size interpolates them bilinearly. None for a stage without them.
        class_token: whether a class token is put in front.
        norm: is applied to the tokens after the blocks, or None.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Iterable[nn.Module],
        *,
        dim: int = 0,
        size: Size | None = None,
        class_token: bool = False,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.size = size
        self.prefix_tokens = int(class_token)
        self.downsample = downsample
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.pos_embed = None
        if size is not None:
            self.pos_embed = nn.Parameter(torch.empty(1, class_token + size[0] * size[1], dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        x, context = add_tokens(x, self.cls_token, self.pos_embed, self.size, "bilinear")
        context.defers = may_defer(self.blocks)
        with convert_weights(self.blocks, x):
            for block in self.blocks:
                x = run_block(block, x, context, self.grad_checkpointing)
        x = add_pending(x, context)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.prefix_tokens else x.unflatten(1, context.size)

    def set_map_size(self, size: Size, interpolation: str) -> None:
        """Interpolate the position embeddings, if there are any, to a map of (H, W)."""
        if self.pos_embed is not None:
            self.pos_embed = resized_position(
                self.pos_embed, size, self.prefix_tokens, self.size, interpolation
            )
            self.size = size


class Head(nn.Module):
    """Pooling, dropout and classifier, from a map (B, H, W, C) or tokens (B, 1 + N, C).

    Args:
        dim: channels C.
        num_classes: classes; 0 for no classifier.
        pool_type: timm's pooling name; of tokens, the first of which is the class token, one of
            `TOKEN_POOLS`.
        drop_rate: dropout before the classifier.
        class_token: whether the input is tokens, with a class token in front.

    Raises:
        ValueError: if tokens have no such pooling.
    """

    def __init__(
        self, dim: int, num_classes: int, pool_type: str, drop_rate: float, class_token: bool
    ) -> None:
        super().__init__()
        self.num_features = dim
        self.class_token = class_token
        self._set_pool(pool_type)
        self.drop = nn.Dropout(drop_rate)
        self.fc = make_classifier(dim, num_classes)

    def _set_pool(self, pool_type: str) -> None:
        if self.class_token:
            self.pool_type = check_token_pool(pool_type)
        else:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC"
            )

    def reset(self, num_classes: int, pool_type: str | None, like: Tensor) -> None:
        """Replace the classifier, and the pooling if `pool_type` is given.

        Args:
            num_classes: classes; 0 for no classifier.
            pool_type: see the class, or None to leave the pooling.
            like: a tensor on the device and in the dtype of the new classifier.
        """
        if pool_type is not None:
            self._set_pool(pool_type)
        self.fc = make_classifier(self.num_features, num_classes, like)
        self.train(self.training)  # new modules start in training mode

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.class_token:
            x = global_pool_nlc(x, self.pool_type, num_prefix_tokens=1)
        else:
            x = self.global_pool(x)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


def resized_position(
    position: nn.Parameter, size: Size, prefix: int, old: Size | None, interpolation: str
) -> nn.Parameter:
    """Position embeddings as a parameter for a map of (H, W); see `resize_position`."""
    resized = resize_position(position.detach(), size, prefix, old, interpolation)
    return nn.Parameter(resized, position.requires_grad)


def _rename_before_loading(
    model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    rename_old_entries(state_dict, model, prefix)


class VisionModel(TimmModel):
    """What all skeletons share of timm's interface.

    Subclasses set `num_classes`, `in_chans`, `num_features`, `head_hidden_size`, `feature_info`
    and `norm`, and compute `forward_features` and `forward_head`.
    """

    # The `checkpoint_filter_fn` of the model's family, which `create_model` sets.
    filter_fn: Callable[..., dict[str, Tensor]] | None = None
    # Below it, an image has no pixel left in the last stage.
    least_side: ClassVar[int] = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_rename_before_loading)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """PyTorch's, which here also takes a checkpoint that is not under the model's names.

        `timm.create_model(name, checkpoint_path=FILE)` ends in this call, without a filter.

        Args:
            state_dict: weights of this library, or of the paper's authors if `strict`.
            strict, assign: as for `torch.nn.Module.load_state_dict`.

        Raises:
            RuntimeError: the weights are of another model or, if `strict`, of other classes.
        """
        if strict and self.filter_fn and state_dict.keys() != self.state_dict().keys():
            # What is no checkpoint of this model is named by PyTorch.
            with suppress(Exception):
                state_dict = self.filter_fn(dict(state_dict), self)
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            config = self.pretrained_cfg
            classifiers = config["classifier"]
            first = classifiers if isinstance(classifiers, str) else classifiers[0]
            theirs = getattr(state_dict.get(f"{first}.bias"), "shape", (self.num_classes,))[0]
            if theirs == self.num_classes:
                raise
            raise RuntimeError(
                f"{error}\n\tThe weights are for {theirs} classes and the model has "
                f"{self.num_classes}: take timm.create_model({config['architecture']!r}, "
                f"pretrained=True, num_classes={self.num_classes}, "
                f"pretrained_cfg_overlay=dict(file=FILE, num_classes={theirs}))"
            ) from None

    def block_places(self) -> list[tuple[nn.ModuleList, int]]:
        """Where each block stands, in order: the list that holds it, and its index there."""
        lists: list[Any] = [part.blocks for part in self.modules() if hasattr(part, "blocks")]
        return [(blocks, i) for blocks in lists for i in range(len(blocks))]

    def _map_sizes(self, img_size: Size) -> list[tuple[nn.Module, Size]]:
        """The modules that hold the blocks of each stage, each with the size of its map."""
        raise NotImplementedError

    def _resize_positions(self, img_size: Size) -> None:
        """Interpolate what the skeleton itself has learned for maps of one size."""
        raise NotImplementedError

    def set_input_size(
        self,
        img_size: int | Size | None = None,
        patch_size: int | Size | None = None,
        window_size: int | Sequence[int] | None = None,
    ) -> None:
        """Interpolate what was learned for images of one size to another one, once.

        The model then is the one that ``timm.create_model(name, img_size=...)`` makes with the same
        weights. New parameters take the place of old ones, so this comes before an optimiser is
        made. Position embeddings, biases of agents and positions of keys are interpolated; windows
        keep their side, unless `window_size` is given.

        Args:
            img_size: side (or height and width) of the images in pixels; None leaves it.
            patch_size: side of the patches in pixels, in plain ViTs alone; None leaves it.
            window_size: side of the windows in tokens, one or one per stage; None leaves it.

        Raises:
            ValueError: for sizes that cannot be, in which case the model is as it was.
        """
        if patch_size is not None:
            raise ValueError(
                f"patch_size is {patch_size}, but the stem of {type(self).__name__} has strides of "
                "its own: leave patch_size out"
            )
        self._set_input_size(img_size, window_size)

    def _set_input_size(
        self, img_size: int | Size | None, window_size: int | Sequence[int] | None
    ) -> None:
        size = None if img_size is None else self.check_image_size(img_size)
        tables = {}
        for stage, map_size in [] if size is None else self._map_sizes(size):
            for module in stage.modules():
                if isinstance(module, TokenMixer):
                    for name, table in module.resize_tables(map_size).items():
                        tables[module, name] = table
        windows = None if window_size is None else self._windows(window_size)
        for (module, name), table in tables.items():
            owner, _, name = name.rpartition(".")
            owner = module.get_submodule(owner)
            old = owner.get_parameter(name)
            setattr(
                owner, name, nn.Parameter(table.detach().to(old.dtype).clone(), old.requires_grad)
            )
        if size is not None:
            self._resize_positions(size)
            record_arguments(self, img_size=size)
        if windows is not None:
            for mixer, side in windows:
                mixer.set_window_size(side)
            kinds = {type(mixer) for mixer, _ in windows}
            chosen = window_size if isinstance(window_size, int) else tuple(window_size or ())
            options = {**(getattr(self, "model_args", {}).get("mixer_options") or {})}
            for name, kind in MIXERS.items():
                if kind in kinds:
                    options[name] = {**options.get(name, {}), "window_size": chosen}
            record_arguments(self, mixer_options=options)

    def _windows(self, window_size: int | Sequence[int]) -> list[tuple[Any, int]]:
        """The mixers of windows, each with the side that its windows are to have.

        Raises:
            ValueError: if there are none, or the sides are not one per stage.
        """
        stages = [stage for stage, _ in self._map_sizes((224, 224))]
        sides = [window_size] * len(stages) if isinstance(window_size, int) else list(window_size)
        if len(sides) != len(stages) or any(type(s) is not int or s < 1 for s in sides):
            raise ValueError(
                f"window_size is {window_size}, expected a number of tokens, or one for each of "
                f"the {len(stages)} stages"
            )
        windows = [
            (module, side)
            for stage, side in zip(stages, sides, strict=True)
            for module in stage.modules()
            if hasattr(module, "set_window_size")
        ]
        if not windows:
            raise ValueError(
                f"window_size is {window_size}, but no mixer of {type(self).__name__} attends "
                "within windows: leave window_size out"
            )
        return windows

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, beyond vectors and biases, that weight decay leaves out.

        They are class tokens and what mixers ask for; position embeddings decay.
        """
        tokens = ("cls_token", "dist_token", "reg_token")
        names = {name for name, _ in self.named_parameters() if name.endswith(tokens)}
        for name, module in self.named_modules():
            if isinstance(module, TokenMixer):
                names |= {f"{name}.{parameter}" for parameter in module.no_weight_decay()}
        return names

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) from images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def check_image_size(self, img_size: int | Sequence[int] | None) -> Size:
        """(H, W) of the images that the model is made for.

        Raises:
            ValueError: if a side is too small for the model, or as `image_size` does.
        """
        size = image_size(img_size)
        if min(size) < self.least_side:
            raise ValueError(f"img_size is {img_size}, at least {self.least_side} is needed")
        return size

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled, normed features from images (B, in_chans, H, W)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) from features; what the classifier takes if `pre_logits`."""
        raise NotImplementedError


class HierarchicalVisionTransformer(VisionModel):
    """A stem, stages that take and give channels-last maps, a norm and a head.

    Subclasses set, besides what `VisionModel` asks for, `stem` (images to the map that the first
    stage takes), `stages` (of `Stage`; the last may give tokens with a class token in front) and
    `head` (with `fc` and `reset(num_classes, pool_type, like)`).
    """

    output_fmt = "NHWC"
    # How weights for another image size are loaded; see `resize_position`.
    position_interpolation: ClassVar[str] = "bicubic"
    stem: nn.Module
    # A ModuleList of `Stage`, which to a type checker is one of any modules.
    stages: Any
    # A module, which in torch has no declared attributes.
    head: Any

    def set_stages(self, stages: Sequence[nn.Module], dims: Sequence[int]) -> None:
        """Take `stages` of widths `dims`, of strides 4, 8, 16 and so on."""
        self.stages = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]

    def _map_sizes(self, img_size: Size) -> list[tuple[nn.Module, Size]]:
        return list(zip(self.stages, stage_sizes(img_size, len(self.stages)), strict=True))

    def _resize_positions(self, img_size: Size) -> None:
        for stage, size in self._map_sizes(img_size):
            cast(Stage, stage).set_map_size(size, self.position_interpolation)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for timm's layer decay; downsampling is in the next block's group."""
        blocks = [
            # A number from which timm knows that a stage's last norm is in the group before it.
            (r"^stages\.(\d+)\.norm", (99999,)),
            (r"^stages\.(\d+)\.(?!blocks)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:norm|head\.(?:projection|norm))", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling if `global_pool` is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, next(self.parameters()))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features, and as maps the outputs of the stages in `indices`.

        Args:
            x: images (B, in_chans, H, W).
            indices: which stages: the last n for an integer, all for None.
            norm: apply the final norm to the last stage's output, if `indices` has that stage.
            stop_early: do not compute the stages after the last one in `indices`.
            output_fmt: 'NCHW' or 'NHWC', of the intermediates.
            intermediates_only: return the list alone.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        announce_pass(self, x)
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        height, width = x.shape[-2:]
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                y = self.norm(x) if norm and i == len(self.stages) - 1 else x
                if getattr(stage, "prefix_tokens", 0):
                    reduction = self.feature_info[i]["reduction"]
                    y = y[:, 1:].unflatten(1, (-(-height // reduction), -(-width // reduction)))
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return self.norm(x) if i == len(self.feature_info) - 1 else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages (and the head) that the outputs in `indices` do not need."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.head = nn.Identity()
            self.num_classes = 0
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised features (B, ceil(H / 32), ceil(W / 32), C), or tokens (B, 1 + N, C)."""
        announce_pass(self, x)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) from features; (B, head_hidden_size) if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)


def image_size(img_size: int | Sequence[int] | None) -> Size:
    """(H, W) of the images that a model is made for; a number is both, None stands for 224.

    Raises:
        ValueError: if it is neither a positive number nor a pair of them.
    """
    size = 224 if img_size is None else img_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"img_size is {img_size}, expected the side of the images in pixels, or (height, width)"
        )
    return sides


def record_arguments(model: nn.Module, **arguments: Any) -> None:
    """Remember arguments with which `timm.create_model` builds the model as it now is.

    timm reads the two private attributes where it exports a model or prepares images for it.
    """
    for name in ("model_args", "_model_args"):
        setattr(model, name, getattr(model, name, {}) | arguments)
    if "img_size" in arguments:
        traits = getattr(model, "_traits", {})
        model._traits = traits | {"img_size": arguments["img_size"]}  # type: ignore[assignment]


def stage_sizes(img_size: Size, stages: int) -> list[Size]:
    """(H, W) of the maps of stages at strides 4, 8, 16 and so on, sides rounded up."""
    height, width = img_size
    strides = [4 * 2**i for i in range(stages)]
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def init_tokens(model: nn.Module, init: Callable[[Tensor], Any]) -> None:
    """Initialise class tokens and position embeddings by `init`."""
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_token", "dist_token", "reg_token", "pos_embed")):
            init(parameter)
