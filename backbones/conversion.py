"""timm's plain vision transformers and Swin as models of this library, with equal outputs."""

import inspect
from typing import Any

import timm
import timm.layers
import timm.models.deit
import timm.models.eva as timm_eva
import timm.models.swin_transformer as timm_swin
import timm.models.vision_transformer as timm_vit
from torch import Tensor, nn

from .checkpoint import check_fit
from .registry import ZOO
from .skeletons.base import VisionModel, image_size
from .skeletons.swin import EPSILON, PATCH, SwinTransformer
from .skeletons.vit import DistilledVisionTransformer, VisionTransformer

SUPPORTED = (
    "timm's plain vit_*, deit_*, deit3_*, *_dinov2, *_dinov3 and swin_*, and linsight's *_deit_*, "
    "*_dinov2_*, *_dinov3_* and *_swin_*"
)
# What `pretrained_cfg` says of the preparation of images.
PREPARATION = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
# What the models of timm's three classes become here.
CLASSES: dict[type[nn.Module], type[VisionTransformer]] = {
    timm_vit.VisionTransformer: VisionTransformer,
    timm_eva.Eva: VisionTransformer,
    timm.models.deit.VisionTransformerDistilled: DistilledVisionTransformer,
}
# The layer scales of timm's Eva.
GAMMAS = ("gamma_1", "gamma_2")
# The `mlp_layer` of timm's feed-forward networks.
MLPS = {timm.layers.Mlp: None, timm.layers.GluMlp: "swiglupacked", timm.layers.SwiGLU: "swiglu"}
# The `act_layer` of timm's activations.
ACTIVATIONS = {
    nn.GELU: None,
    timm.layers.GELU: None,
    timm.layers.GELUTanh: "gelu_tanh",
    timm.layers.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
}


def convert_timm_model(model: nn.Module) -> VisionModel:
    """One of timm's plain vision transformers, or its Swin, as a model of this library.

    Args:
        model: a model that timm has built: ViT, DeiT or DINOv2, with or without registers, DINOv3
            or Swin. A vision transformer or Swin of this library is returned as it is.

    Returns:
        A model with copies of the weights and the same outputs, in the same mode, on the same
        device and in the same dtype. What is random in training, such as dropout, is left out. Its
        name is in `pretrained_cfg["architecture"]`, and its `model_args` are the arguments with
        which `timm.create_model` builds it.

    Raises:
        ValueError: if the model has a part that this library's body lacks.
    """
    if isinstance(model, VisionTransformer) or type(model) is SwinTransformer:
        return model
    name, arguments = describe_timm_model(model)
    reference: Any = model
    weights = reference.state_dict()
    if not isinstance(model, timm_swin.SwinTransformer):
        _add_zero_biases(weights)
    settings = {
        key: reference.pretrained_cfg.get(key)
        for key in PREPARATION
        if reference.pretrained_cfg.get(key) is not None
    }
    like = weights["patch_embed.proj.weight"]
    with like.device:
        # Weights are copied in at once.
        ours: Any = timm.create_model(name, pretrained_cfg_overlay=settings, **arguments)
    converted = ZOO[name].family.filter_fn(weights, ours)
    check_fit(converted, ours, f"{type(model).__name__} of timm cannot be converted")
    ours.load_state_dict(converted)
    return ours.to(like.dtype).train(model.training)


def _add_zero_biases(weights: dict[str, Tensor]) -> None:
    """A projection without a bias is one whose bias is zero; so is the patches' in CLIP."""
    for name, weight in list(weights.items()):
        layer, _, kind = name.rpartition(".")
        # Eva has biases of q and v by names of their own, which the filter knows.
        known = f"{layer.removesuffix('qkv')}q_bias" in weights
        if kind == "weight" and layer.endswith((".qkv", ".proj")) and not known:
            weights.setdefault(f"{layer}.bias", weight.new_zeros(len(weight)))


def describe_timm_model(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The name and the arguments with which `timm.create_model` builds this library's twin of one
    of timm's models.

    Raises:
        ValueError: if the model has a part that this library's body lacks.
    """
    if type(model) is timm_swin.SwinTransformer:
        return _nearest_row(SwinTransformer, _describe_swin(model))
    skeleton = CLASSES.get(type(model))
    if skeleton is None:
        raise ValueError(f"model is a {type(model).__name__}; supported are {SUPPORTED}")
    reference: Any = model
    _check_parts(reference)
    block = reference.blocks[0]
    dim, mlp, mlp_layer = reference.embed_dim, block.mlp, MLPS[type(block.mlp)]
    hidden = mlp.fc1.out_features if mlp_layer == "swiglupacked" else mlp.fc2.in_features
    ratio = hidden / dim
    rotary = isinstance(model, timm_eva.Eva)
    scaled = block if rotary else block.ls1
    arguments = {
        "img_size": tuple(reference.patch_embed.img_size),
        "in_chans": reference.in_chans,
        "num_classes": reference.num_classes,
        "global_pool": reference.global_pool,
        "embed_dim": dim,
        "depth": len(reference.blocks),
        "num_heads": block.attn.num_heads,
        "patch_size": reference.patch_embed.patch_size[0],
        # `int(ratio * dim)` must be the hidden width again.
        "mlp_ratio": ratio if int(ratio * dim) == hidden else (hidden + 0.5) / dim,
        "mlp_layer": mlp_layer,
        "act_layer": ACTIVATIONS[type(mlp.act)] if mlp_layer is None else None,
        "class_token": reference.cls_token is not None,
        "reg_tokens": 0 if reference.reg_token is None else reference.reg_token.shape[1],
        "no_embed_class": reference.no_embed_class,
        "rotary_temperature": reference.rope.temperature if rotary else None,
        "layer_scale": None if isinstance(scaled, nn.Identity) else scaled.init_values,
        "norm_eps": block.norm1.eps,
        "pre_norm": not isinstance(reference.norm_pre, nn.Identity),
        "fc_norm": not isinstance(reference.fc_norm, nn.Identity),
    }
    return _nearest_row(skeleton, arguments)


def _describe_swin(model: Any) -> dict[str, Any]:
    """The arguments of this library's twin of a Swin of timm.

    Raises:
        ValueError: if the model has a part that this library's body lacks.
    """
    blocks = [block for layer in model.layers for block in layer.blocks]
    norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    faults = {
        f"patches of {model.patch_embed.patch_size}": model.patch_embed.patch_size != (PATCH, PATCH)
        or isinstance(model.patch_embed.norm, nn.Identity),
        "windows that are no squares": any(len(set(b.attn.window_size)) > 1 for b in blocks),
        "a projection without a bias": any(b.attn.qkv.bias is None for b in blocks),
        "another feed-forward network than timm's Mlp with GELU": any(
            type(b.mlp) is not timm.layers.Mlp or type(b.mlp.act) not in (nn.GELU, timm.layers.GELU)
            for b in blocks
        ),
        f"norms other than LayerNorm with an epsilon of {EPSILON:g}": any(
            type(norm) not in (nn.LayerNorm, timm.layers.LayerNorm) or norm.eps != EPSILON
            for norm in norms
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ValueError(f"model has {fault}; supported are {SUPPORTED}")
    stages = [layer.blocks for layer in model.layers]
    first = stages[0][0]
    # A map that is no larger than a window is the window, here as in timm.
    sides = tuple(blocks[0].attn.window_size[0] for blocks in stages)
    return {
        "img_size": tuple(model.patch_embed.img_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depths": tuple(len(blocks) for blocks in stages),
        "num_heads": tuple(blocks[0].attn.num_heads for blocks in stages),
        "mlp_ratio": first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        "mixer_options": {"window": {"padding": "end_after_shift", "window_size": sides}},
    }


def _nearest_row(
    skeleton: type[nn.Module], arguments: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The softmax model from whose own arguments the fewest differ, and those that differ."""
    body = VisionTransformer if issubclass(skeleton, VisionTransformer) else skeleton
    parameters = inspect.signature(body).parameters.values()
    defaults = {p.name: p.default for p in parameters}
    candidates = []
    for name, row in ZOO.items():
        if row.family.skeleton is skeleton and name.startswith("softmax_"):
            config = defaults | row.family.config | row.config
            config["img_size"] = image_size(config["img_size"])
            others = {k: v for k, v in arguments.items() if config[k] != v}
            candidates.append((name, others))
    return min(candidates, key=lambda candidate: len(candidate[1]))


def _check_parts(model: Any) -> None:
    """Refuse a vision transformer of timm with a part that this library's body lacks.

    Raises:
        ValueError: it has one; the message names it.
    """
    name = model.pretrained_cfg.get("architecture", type(model).__name__)
    own = _faults_of_eva if isinstance(model, timm_eva.Eva) else _faults_of_vit
    for fault, found in (own(model) | _faults_of_all(model)).items():
        if found:
            raise ValueError(f"model {name} has {fault}; supported are {SUPPORTED}")


def _faults_of_vit(model: Any) -> dict[str, bool]:
    """Parts that timm's plain vision transformer may have and this library's has not."""
    attentions: list[Any] = [getattr(block, "attn", None) for block in model.blocks]
    distilled = isinstance(model, timm.models.deit.VisionTransformerDistilled)
    pooled_with_prefix = model.pool_include_prefix and model.global_pool not in ("", "token")
    return {
        "blocks other than timm's Block": any(
            type(block) is not timm_vit.Block for block in model.blocks
        ),
        "another attention than timm's Attention": any(
            type(attn) is not timm.layers.Attention
            or _has_more_parts(attn)
            or attn.attn_dim != model.embed_dim
            for attn in attentions
        ),
        "no position embedding": model.pos_embed is None,
        "class tokens in its pooling": pooled_with_prefix,
        "registers beside a distillation token": distilled and bool(model.num_reg_tokens),
    }


def _faults_of_eva(model: Any) -> dict[str, bool]:
    """Parts that timm's Eva may have and DINOv3, as it is in this library, has not."""
    rope, blocks = model.rope, list(model.blocks)
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks]
    return {
        "other positions than DINOv3's rotary ones": model.pos_embed is not None
        or type(rope) is not timm.layers.RotaryEmbeddingDinoV3
        or rope.temperature is None
        or rope.min_period is not None
        or rope.normalize_coords != "separate"
        or rope.grid_offset != 0
        or rope.grid_indexing != "ij"
        or not rope.rotate_half,
        "blocks other than timm's EvaBlock": any(
            type(block) is not timm_eva.EvaBlock for block in blocks
        ),
        "another attention than timm's EvaAttention": any(
            type(attn) is not timm_eva.EvaAttention
            or _has_more_parts(attn)
            or attn.head_dim * attn.num_heads != model.embed_dim
            for attn in attentions
        ),
        "layer scales in some branches": len(
            {getattr(block, part, None) is None for block in blocks for part in GAMMAS}
        )
        != 1,
        "two last norms": not any(isinstance(m, nn.Identity) for m in (model.norm, model.fc_norm)),
    }


def _has_more_parts(attention: Any) -> bool:
    """Whether there are norms or a gate between an attention's projections."""
    parts = (getattr(attention, part, None) for part in ("q_norm", "k_norm", "norm", "gate"))
    return any(not isinstance(part, nn.Identity | None) for part in parts)


def _faults_of_all(model: Any) -> dict[str, bool]:
    """Parts that both of timm's classes may have and this library's has not."""
    mlps: list[Any] = [getattr(block, "mlp", None) for block in model.blocks]
    norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    patch = model.patch_embed
    return {
        "another patch embedding than timm's PatchEmbed": type(patch) is not timm.layers.PatchEmbed
        or not isinstance(patch.norm, nn.Identity)
        or patch.patch_size[0] != patch.patch_size[1],
        "another feed-forward network than timm's Mlp, SwiGLU or SwiGLUPacked": not all(
            type(mlp) in MLPS
            and isinstance(mlp.norm, nn.Identity)
            and not getattr(mlp, "gate_last", False)
            and all(layer.bias is not None for layer in mlp.children() if type(layer) is nn.Linear)
            and type(mlp.act) in ACTIVATIONS
            and getattr(mlp.act, "approximate", "none") == "none"
            and (type(mlp) is timm.layers.Mlp or type(mlp.act) is nn.SiLU)
            for mlp in mlps
        ),
        "norms other than LayerNorm of one epsilon": len({norm.eps for norm in norms}) != 1
        or any(not isinstance(norm, nn.LayerNorm) or norm.bias is None for norm in norms),
        "no last norm": all(isinstance(m, nn.Identity) for m in (model.norm, model.fc_norm)),
        "attention pooling": model.attn_pool is not None,
    }
