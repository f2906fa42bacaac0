"""The plain Vision Transformer (arXiv:2010.11929), as DeiT (arXiv:2012.12877), DINOv2
(arXiv:2304.07193) and DINOv3 (arXiv:2508.10104) train it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from timm.layers import global_pool_nlc, resample_patch_embed, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...kernels.runtime.rehearsal import announce_pass
from ..activations import ActLayer
from ..blocks import BlockLayers, MlpLayer
from ..checkpoint import check_model, convert_mixers, rename, resize_position, unwrap
from ..context import Context
from ..initialization import init_linear_layers
from ..layers import PatchEmbed, check_token_pool, make_classifier
from ..linear import convert_weights
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..norms import LayerNorm, NormLayer, resolve_norm_layer
from ..unused import depend_on
from .base import (
    Size,
    VisionModel,
    add_tokens,
    build_blocks,
    init_tokens,
    record_arguments,
    resized_position,
    run_block,
)
from .dinov3 import convert_dinov3


class VisionTransformer(VisionModel):
    """Patches, perhaps class and register tokens, blocks of one width, a norm and a linear head.

    The tokens in front of the map are the class token, then the registers.

    Args:
        img_size: side (or height and width) of the images whose position embedding is learned;
            every other size interpolates it, and sides that the patch does not divide are
            padded with zeros at the bottom and right.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: 'token' (the class token), 'avg', 'max', 'avgmax', or '' for no pooling; by
            default 'token' if the model has a class token, else 'avg'.
        embed_dim, depth, num_heads: width, number of blocks, heads.
        mixer: name of the token mixer (`linsight.backbones.mixers`), or a sequence with one name
            per block.
        mixer_options: keyword arguments by mixer.
        block: the block (`linsight.backbones.blocks`), a class, a partial of one or a name, or a
            sequence with one per depth.
        norm_layer, act_layer, mlp_layer: a class, a partial of one or a name, or None for the
            authors' own.
        class_token: whether a class token stands in front of the patches; or 'unused' for one that
            the model holds, because its authors' does, and that no output depends on.
        reg_tokens: number of register tokens (arXiv:2309.16588) behind the class token.
        no_embed_class: whether the map alone has position embeddings, not the tokens in front.
        rotary_temperature: if given, positions are DINOv3's rotary ones of this temperature, and
            there are no position embeddings: mixers rotate the queries and keys of the map's
            tokens. They fit every size of images.
        layer_scale: initial value of the layer scales of both branches, or None for no scales.
        norm_eps: epsilon of the layer norms, unless `norm_layer` is given.
        pre_norm: whether a norm stands before the first block, as in CLIP.
        fc_norm: whether the last norm stands behind the pooling rather than before it.
        patch_size: side of the patches in pixels.
        mlp_ratio: hidden width of the feed-forward network over its width.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: for an unknown mixer, block, layer or pooling, a mixer that takes no class
            token in a model with one, the pooling 'token' in a model without, or rotary positions
            with heads of a number of channels that 4 does not divide.
    """

    output_fmt = "NLC"
    # Whether a distillation token stands behind the class token.
    distilled: ClassVar[bool] = False

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        *,
        embed_dim: int,
        depth: int = 12,
        num_heads: int,
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        block: BlockLayers = "transformer",
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
        class_token: bool | Literal["unused"] = True,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        rotary_temperature: float | None = None,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        pre_norm: bool = False,
        fc_norm: bool = False,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.img_size = self.check_image_size(img_size)
        self.size = patch_grid(self.img_size, patch_size)
        self.has_class_token = class_token is True
        self.num_prefix_tokens = prefix = self.has_class_token + self.distilled + reg_tokens
        self.no_embed_class = no_embed_class
        self.num_heads = num_heads
        self.grad_checkpointing = False
        self.patch_side = patch_size
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if self.distilled else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.position_prefix = 0 if no_embed_class else prefix
        self.rotary_temperature = rotary_temperature
        self.pos_embed = None
        if rotary_temperature is None:
            tokens = self.position_prefix + self.size[0] * self.size[1]
            self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim))
        elif rotary_temperature <= 0:
            raise ValueError(
                f"rotary_temperature is {rotary_temperature}, expected a positive number such as "
                "100, or None for learned position embeddings"
            )
        make_norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=norm_eps))
        self.norm_pre = make_norm(embed_dim) if pre_norm else None
        layers = {
            "mlp_ratio": mlp_ratio,
            "layer_scale": layer_scale,
            "eps": norm_eps,
            "norm_layer": norm_layer,
            "act_layer": act_layer,
            "mlp_layer": mlp_layer,
        }
        # The whole model is one stage.
        (blocks,) = build_blocks(
            (embed_dim,),
            (self.size,),
            depths=(depth,),
            num_heads=(num_heads,),
            mixer=_of_one_stage(mixer),
            mixer_options=mixer_options,
            block=_of_one_stage(block),
            drop_path_rate=drop_path_rate,
            options=lambda _: layers,
            prefix_tokens=(prefix,),
            rotary=rotary_temperature is not None,
        )
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        self.norm = nn.Identity() if fc_norm else make_norm(embed_dim)
        self.fc_norm = make_norm(embed_dim) if fc_norm else None
        self.head_drop = nn.Dropout(drop_rate)
        self.head = make_classifier(embed_dim, num_classes)
        self.head_dist = make_classifier(embed_dim, num_classes) if self.distilled else None
        self._set_pool(
            global_pool if global_pool is not None else "token" if self.has_class_token else "avg"
        )
        init_linear_layers(self, skip=TokenMixer)
        init_tokens(self, partial(trunc_normal_, std=0.02))

    def _set_pool(self, global_pool: str) -> None:
        if global_pool == "token" and not self.has_class_token:
            raise ValueError(
                "global_pool is 'token', but the model has no class token: take 'avg', 'max' or "
                "'avgmax', or class_token=True"
            )
        self.global_pool = check_token_pool(global_pool)

    def set_input_size(
        self,
        img_size: int | Size | None = None,
        patch_size: int | Size | None = None,
        window_size: int | Sequence[int] | None = None,
    ) -> None:
        """Interpolate what was learned for one image size, or one size of patches, to another.

        See `VisionModel.set_input_size`. Filters of patches of another size are the nearest in the
        sense of FlexiViT (arXiv:2212.08013).
        """
        if patch_size is None:
            self._set_input_size(img_size, window_size)
            return
        sides = [patch_size] * 2 if isinstance(patch_size, int) else list(patch_size)
        if len(set(sides)) != 1 or type(sides[0]) is not int or sides[0] < 1:
            raise ValueError(f"patch_size is {patch_size}, expected one side in pixels")
        before, self.patch_side = self.patch_side, sides[0]
        try:
            self._set_input_size(self.img_size if img_size is None else img_size, window_size)
        except ValueError:
            self.patch_side = before
            raise
        if sides[0] == before:
            return
        old = self.patch_embed
        self.patch_embed = PatchEmbed(self.in_chans, self.embed_dim, sides[0])
        self.patch_embed.to(old.proj.weight)
        weight, bias = resample_patch_embed(old.proj.weight.detach(), sides), old.proj.bias
        self.patch_embed.proj.weight = nn.Parameter(weight, old.proj.weight.requires_grad)
        self.patch_embed.proj.bias = bias
        self.patch_embed.train(old.training)
        for info in self.feature_info:
            info["reduction"] = sides[0]
        record_arguments(self, patch_size=sides[0])

    def _map_sizes(self, img_size: Size) -> list[tuple[nn.Module, Size]]:
        return [(self.blocks, patch_grid(img_size, self.patch_side))]

    def _resize_positions(self, img_size: Size) -> None:
        size = patch_grid(img_size, self.patch_side)
        if self.pos_embed is not None:
            self.pos_embed = resized_position(
                self.pos_embed, size, self.position_prefix, self.size, "bicubic"
            )
        self.img_size, self.size = img_size, size

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, beyond vectors and biases, that weight decay leaves out."""
        return super().no_weight_decay() | {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for timm's layer decay."""
        return {
            "stem": r"^cls_token|^dist_token|^reg_token|^pos_embed|^patch_embed|^norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^(?:fc_)?norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling if `global_pool` is given."""
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        self.head = make_classifier(self.embed_dim, num_classes, next(self.parameters()))
        self.head.train(self.training)  # new modules start in training mode

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Context]:
        """Images to the first block's tokens (B, P + H * W, C), and their context."""
        announce_pass(self, x)
        x = self.patch_embed(x)
        token, position = self.cls_token, self.pos_embed
        if token is not None and not self.has_class_token:
            unused, token = token, None
            if position is None:
                x = depend_on(x, unused)
            else:
                position = depend_on(position, unused)
        tokens: list[Tensor] = [
            t for t in (token, self.dist_token, self.reg_token) if t is not None
        ]
        prefix = torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0] if tokens else None
        x, context = add_tokens(
            x, prefix, position, self.size, "bicubic", embed_prefix=not self.no_embed_class
        )
        context.rotary_temperature = self.rotary_temperature
        return x if self.norm_pre is None else self.norm_pre(x), context

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final tokens and the outputs of the blocks in `indices`.

        Args:
            x: images (B, in_chans, H, W).
            indices: which blocks: the last n for an integer, all for None.
            return_prefix_tokens: return each output in a pair with the class token (B, P, C).
            norm: apply the final norm to every one of them.
            stop_early: do not compute the blocks after the last one in `indices`.
            output_fmt: 'NCHW' for maps or 'NLC' for tokens, of the intermediates.
            intermediates_only: return the list alone.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        intermediates = []
        x, context = self.forward_tokens(x)
        with convert_weights(self.blocks, x):
            for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
                x = run_block(block, x, context, self.grad_checkpointing)
                if i in take:
                    y = self.norm(x) if norm else x
                    prefix, y = y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :]
                    if output_fmt == "NCHW":
                        y = y.unflatten(1, context.size).permute(0, 3, 1, 2)
                    intermediates.append((y, prefix) if return_prefix_tokens else y)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks (and the norm and the head) that the outputs in `indices` do not need."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens (B, P + H * W, C), the class token, if there is one, first."""
        x, context = self.forward_tokens(x)
        with convert_weights(self.blocks, x):
            for block in self.blocks:
                x = run_block(block, x, context, self.grad_checkpointing)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) from tokens; (B, C) if `pre_logits`."""
        pooled = global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(pooled if self.fc_norm is None else self.fc_norm(pooled))
        return x if pre_logits else self.head(x)


class DistilledVisionTransformer(VisionTransformer):
    """DeiT with a distillation token behind the class token (section 4 of arXiv:2012.12877).

    Each of the two tokens has a classifier, and logits are the mean of both.

    Args:
        others: as in `VisionTransformer`; the pooling is 'token' or ''.
    """

    distilled = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.distilled_training = False

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in ("token", ""):
            raise ValueError(
                f"global_pool is {global_pool!r}, but the two classifiers read the class token and "
                "the distillation token: take 'token'"
            )
        super()._set_pool(global_pool)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Give both classifiers' logits as a pair in training, as timm's distilled models do."""
        self.distilled_training = enable

    def get_classifier(self) -> Any:
        """The linear layers of both classifiers, the second one for distillation."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers by fresh ones, and the pooling if `global_pool` is given."""
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = make_classifier(self.embed_dim, num_classes, next(self.parameters()))
        self.head_dist.train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Logits (B, num_classes) from tokens, a pair of them in training with distillation.

        With `pre_logits` it is the mean of both tokens (B, C).
        """
        if not self.global_pool:
            x = self.head_drop(x)
            return x if pre_logits else (self.head(x) + self.head_dist(x)) / 2
        token, dist_token = self.head_drop(x[:, :2]).unbind(1)
        if pre_logits:
            return (token + dist_token) / 2
        logits, dist_logits = self.head(token), self.head_dist(dist_token)
        if self.distilled_training and self.training:
            return logits, dist_logits
        return (logits + dist_logits) / 2


def patch_grid(img_size: Size, side: int) -> Size:
    """(H, W) of the map of patches, the image's sides rounded up."""
    return -(-img_size[0] // side), -(-img_size[1] // side)


def _of_one_stage(choice: Any) -> Any:
    """A sequence with one choice per depth, in the form of a choice for one stage."""
    if isinstance(choice, (tuple, list)) and not isinstance(choice[0], (tuple, list)):
        return (tuple(choice),)
    return choice


# The names of the layer scales in timm's and DINOv2's checkpoints, and of the mixer.
TIMM_NAMES = {".attn.": ".mixer.", ".ls1.gamma": ".gamma1", ".ls2.gamma": ".gamma2"}
# The names of Hugging Face's transformers for DINOv2: of its files and, since version 5, of its
# modules.
TRANSFORMERS_NAMES = {
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "embeddings.": "",
    "encoder.layer.": "blocks.",
    ".attention.output.dense.": ".mixer.out_proj.",
    ".attention.attention.": ".mixer.",
    ".attention.o_proj.": ".mixer.out_proj.",
    ".attention.q_proj.": ".mixer.query.",
    ".attention.k_proj.": ".mixer.key.",
    ".attention.v_proj.": ".mixer.value.",
    ".layer_scale1.lambda1": ".gamma1",
    ".layer_scale2.lambda1": ".gamma2",
    ".mlp.weights_in.": ".mlp.fc1.",
    ".mlp.weights_out.": ".mlp.fc2.",
    "layernorm.": "norm.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """A checkpoint under this library's names.

    It may be one of timm's ViT, DeiT and DINOv2, of DeiT's and DINOv2's authors, of transformers'
    DINOv2, of a mixer's authors in this body, or of this library; for a body with rotary positions,
    one of those that `convert_dinov3` takes, or of this library. Position embeddings and tables of
    another image size are interpolated.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if model.rotary_temperature is not None:
        state_dict = convert_dinov3(state_dict, model.num_heads)
    elif any("embeddings.cls_token" in name for name in state_dict):
        state_dict = convert_transformers(state_dict)
    state_dict = {rename(name, TIMM_NAMES): v for name, v in state_dict.items()}
    for name, value in state_dict.items():
        if name.endswith((".gamma1", ".gamma2")) and value.ndim == 1:
            state_dict[name] = value.view(1, 1, 1, -1)
    take_authors_registers(state_dict)
    state_dict = convert_mixers(state_dict, model)
    if (position := state_dict.get("pos_embed")) is not None and model.pos_embed is not None:
        state_dict["pos_embed"] = resize_position(position, model.size, model.position_prefix)
    check_model(state_dict, model)
    return state_dict


def convert_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of transformers' DINOv2 alone, under the names of DINOv2's authors.

    What stands on the backbone, such as a decoder, is left out.
    """
    (token,) = (name for name in state_dict if name.endswith("embeddings.cls_token"))
    prefix = token.removesuffix("embeddings.cls_token")
    state_dict = {
        rename(name.removeprefix(prefix), TRANSFORMERS_NAMES): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }
    for name in [name for name in state_dict if ".mixer.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        packed = torch.cat([state_dict.pop(part) for part in parts])
        state_dict[name.replace(".query.", ".in_proj.")] = packed
    return state_dict


def take_authors_registers(state_dict: dict[str, Tensor]) -> None:
    """Bring the tokens of DINOv2's authors into timm's form, in place.

    Their class token has a position, their registers have none, and a token for masked patches is
    read in pretraining alone.
    """
    state_dict.pop("mask_token", None)
    registers, position = state_dict.pop("register_tokens", None), state_dict.get("pos_embed")
    if registers is not None and position is not None:
        state_dict["reg_token"] = registers
        state_dict["cls_token"] = state_dict["cls_token"] + position[:, :1]
        state_dict["pos_embed"] = position[:, 1:]
