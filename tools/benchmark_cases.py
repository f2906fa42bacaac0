"""The cases of `linsight benchmark`: operators, mixers and models, each with its peers.

Operators and mixers get maps of the first two stages of `rala_vit_small`: 64 channels in one head
at stride 4, and 128 channels in two heads at stride 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

import linsight  # noqa: F401  registers the models
from linsight.backbones import ZOO
from linsight.backbones.context import Context
from linsight.backbones.skeletons.base import HierarchicalVisionTransformer
from linsight.kernels.depthwise_conv2d import depthwise_conv2d
from linsight.kernels.flow_attention import flow_attention
from linsight.kernels.focused_linear_attention import focused_linear_attention
from linsight.kernels.hash_attention import hash_attention
from linsight.kernels.linear_attention import linear_attention
from linsight.kernels.mixed_state_attention import mixed_state_attention
from linsight.kernels.polarity_attention import polarity_attention
from linsight.kernels.projected_linear_attention import projected_linear_attention
from linsight.kernels.rotary import Rotary, rotary_tables
from linsight.kernels.runtime.dispatch import current_choice
from linsight.kernels.softmax_attention import attention_of_parts

MODELS = (
    "rala_vit_small",
    "mala_vit_small",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch16_224",
    "convnext_tiny",
    "efficientvit_b2",
)
# Batch sizes by the largest resolution that they are for, on a GPU of 80 GB. Larger images have a
# batch of 1, and a CPU has a batch of 2.
BATCHES = {
    "inference": {224: 256, 512: 48, 1024: 12},
    "training": {224: 128, 512: 24, 1024: 4},
    "operators": {224: 64, 512: 16},
}
HEAD = 64
STAGES = ((4, 1), (8, 2))  # stride and heads
MECHANISMS: dict[str, dict[str, Any]] = {
    "rala": {"key_weights": "global_query"},
    "mala": {"readout": "magnitude_aware"},
}

# Makes a random tensor (B, ...) from the shape of one image's part.
Noise = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One module at one resolution.

    Attributes:
        kind: 'operators', 'mixers', 'models', 'cold', 'detectors' or 'segmentors'.
        name: name of what is measured.
        peer_of: name of the case that this one is compared with; empty for linsight's own cases.
        resolution: side of the image in pixels.
        batch: number of images.
        shape: shape of the input, as text.
        build: function that makes the module on a device.
        inputs: function that makes the arguments and, last, the gradient of the result. Models
            have None, as they take images.
        moved: number of elements that the forward pass and the backward pass must read or write;
            None for models.
        reference: whether the operators run their PyTorch references.
        width: width of the image, where it differs from the resolution.
    """

    kind: str
    name: str
    peer_of: str
    resolution: int
    batch: int
    shape: str
    build: Callable[[torch.device], nn.Module]
    inputs: Callable[[Noise], list[Tensor]] | None = None
    moved: tuple[int, int] | None = None
    reference: bool = False
    width: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.resolution, self.width or self.resolution


def default_batch(kind: str, resolution: int, device: torch.device) -> int:
    """Default batch size for 'inference', 'training' or 'operators' at a resolution."""
    if device.type != "cuda":
        return 2
    return next((n for most, n in BATCHES[kind].items() if resolution <= most), 1)


class Rotated(nn.Module):
    """Holds rotary tables in at least float32."""

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.tables = rotary_tables(size, HEAD, torch.float32, device)

    def rotary(self, x: Tensor) -> Rotary:
        rows, columns = (
            table.to(torch.promote_types(x.dtype, table.dtype)) for table in self.tables
        )
        return rows, columns


class Attention(Rotated):
    """`linear_attention` of tokens (B, N, heads, D)."""

    def __init__(self, mechanism: dict, size: tuple[int, int], device: torch.device) -> None:
        super().__init__(size, device)
        self.mechanism = mechanism

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        local: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        return linear_attention(
            query,
            key,
            value,
            local=local,
            gate=gate,
            rotary=self.rotary(query),
            **self.mechanism,
        )


class PlainAttention(nn.Module):
    """`linear_attention` of tokens (B, N, heads, D) with its defaults."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return linear_attention(query, key, value)


class FlashBidirectional(PlainAttention):
    """The same by flash-bidirectional-linear-attention, which takes features, (B, heads, N, D)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if current_choice() == "reference":  # it is checked against linsight's
            return super().forward(query, key, value)
        from flash_bla.ops.linear_attn.fused import (  # pyright: ignore[reportMissingImports]
            linear_attention as attend,
        )

        features = (F.elu(x) + 1 for x in (query, key))
        return attend(*(x.transpose(1, 2) for x in (*features, value))).transpose(1, 2)


class FocusedAttention(nn.Module):
    """`focused_linear_attention` of tokens (B, N, heads, D)."""

    def __init__(self, heads: int, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(heads * HEAD, device=device))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return focused_linear_attention(query, key, value, self.scale)


class PolarityAttention(nn.Module):
    """`polarity_attention` of tokens (B, N, heads, D)."""

    def __init__(self, heads: int, device: torch.device) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.full((heads, HEAD), 3.0, device=device))
        self.scale = nn.Parameter(torch.ones(heads, HEAD, device=device))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        local: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        return polarity_attention(query, key, value, self.power, self.scale, local=local, gate=gate)


class FlowAttention(nn.Module):
    """`flow_attention` of tokens (B, N, heads, D)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flow_attention(query, key, value)


class HashAttention(nn.Module):
    """`hash_attention` of tokens (B, N, heads, D), with codes of 16 bits from 25 anchors."""

    def __init__(self, heads: int, device: torch.device) -> None:
        super().__init__()
        self.anchors = nn.Buffer(F.normalize(torch.randn(heads, 25, HEAD, device=device), dim=-1))
        self.means = nn.Buffer(torch.full((heads, 25), 0.6, device=device))
        self.hyperplanes = nn.Buffer(torch.randn(heads, 16, 25, device=device))

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        return hash_attention(query, value, self.anchors, self.means, self.hyperplanes)


class MixedStateAttention(nn.Module):
    """`mixed_state_attention` of tokens (B, N, heads, D), with 4 x 4 squares."""

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.mixing = nn.Parameter(torch.ones(16, 16, device=device))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mixed_state_attention(query, key, value, self.mixing, self.size)


class SoftmaxAttention(nn.Module):
    """`F.scaled_dot_product_attention` of tokens (B, N, heads, D)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)


class AttentionOfParts(nn.Module):
    """`attention_of_parts` of tokens (B, N, C), a whole and two shares."""

    def forward(self, query: Tensor, *parts: Tensor) -> Tensor:
        whole, *shares = zip(parts[::2], parts[1::2], strict=True)
        return attention_of_parts(query, whole, shares)


class Depthwise(nn.Conv2d):
    """`depthwise_conv2d` of a map (B, H, W, C).

    Args:
        channels, kernel_size: of the convolution.
        options: as of the operator.
    """

    def __init__(self, channels: int, kernel_size: int | tuple[int, int], **options: Any) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, **self.options)


class ProjectedAttention(Rotated):
    """`projected_linear_attention` of a packed map (B, H, W, 4 C)."""

    def __init__(
        self, mechanism: str, size: tuple[int, int], heads: int, device: torch.device
    ) -> None:
        super().__init__(size, device)
        self.mechanism = MECHANISMS[mechanism]
        self.heads = heads
        self.local = Depthwise(heads * HEAD, 5)

    def forward(self, projection: Tensor) -> Tensor:
        return projected_linear_attention(
            projection,
            self.local.weight,
            self.local.bias,
            heads=self.heads,
            rotary=self.rotary(projection),
            **self.mechanism,
        )


class Mixer(nn.Module):
    """A token mixer from projection to projection, on tokens (B, N, C)."""

    def __init__(self, name: str, stage: int, size: tuple[int, int]) -> None:
        super().__init__()
        model = timm.create_model("rala_vit_small", mixer=name, depths=(1, 1, 1, 1))
        self.mixer = cast(HierarchicalVisionTransformer, model).stages[stage].blocks[0].mixer
        self.context = Context(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, self.context)


def operators(resolution: int, batch: int) -> Iterator[Case]:
    """Cases of the operators at a resolution, each followed by its peers."""
    for stride, heads in STAGES:
        side = max(1, resolution // stride)
        size = (side, side)
        for case in _operators(size, heads, resolution, batch):
            yield case
            yield replace(case, name="reference", peer_of=case.name, reference=True)
            if case.name == "rala_attention":
                yield replace(
                    case, name="sdpa", peer_of=case.name, build=lambda device: SoftmaxAttention()
                )
            if case.name == "linear_attention" and has_flash_bidirectional():
                yield replace(
                    case,
                    name="flash_bla",
                    peer_of=case.name,
                    build=lambda device: FlashBidirectional(),
                )


def has_flash_bidirectional() -> bool:
    """Whether flash-bidirectional-linear-attention is installed, and has the GPU it runs on."""
    return find_spec("flash_bla") is not None and torch.cuda.is_available()


def _operators(size: tuple[int, int], heads: int, resolution: int, batch: int) -> Iterator[Case]:
    height, width = size
    tokens, channels = height * width, heads * HEAD

    def case(
        name: str, build: Callable, inputs: Callable, passes: tuple[int, int], channels: int
    ) -> Case:
        shape = f"{batch} x {height} x {width} x {channels}"
        one = batch * tokens * channels
        moved = (passes[0] * one, passes[1] * one)
        return Case("operators", name, "", resolution, batch, shape, build, inputs, moved)

    def packed(noise: Noise) -> list[Tensor]:
        return [*noise(tokens, 3, heads, HEAD).unbind(2), noise(tokens, heads, HEAD)]

    def gated(noise: Noise) -> list[Tensor]:
        query, key, value, gate = noise(tokens, 4, heads, HEAD).unbind(2)
        local, slope = noise(tokens, heads, HEAD), noise(tokens, heads, HEAD)
        return [query, key, value, local, gate, slope]

    for name, mechanism in MECHANISMS.items():
        more = name == "rala"  # it reads q once more, for the mean query

        def build(device: torch.device, mechanism: dict = mechanism) -> nn.Module:
            return Attention(mechanism, size, device)

        yield case(f"{name}_attention", build, packed, (4 + more, 9), channels)
        yield case(f"{name}_attention_gated", build, gated, (6 + more, 13), channels)

        def project(device: torch.device, name: str = name) -> nn.Module:
            return ProjectedAttention(name, size, heads, device)

        def projection(noise: Noise) -> list[Tensor]:
            return [noise(height, width, 4 * channels), noise(height, width, channels)]

        yield case(f"{name}_projected", project, projection, (6 + more, 14), channels)
    yield case("linear_attention", lambda device: PlainAttention(), packed, (4, 9), channels)
    norm_aware = partial(Attention, {"feature_map": "norm_aware"}, size)
    yield case("norm_aware_attention", norm_aware, packed, (4, 9), channels)
    yield case("focused_attention", partial(FocusedAttention, heads), packed, (4, 9), channels)
    polarity = partial(PolarityAttention, heads)
    yield case("polarity_attention", polarity, packed, (4, 9), channels)
    yield case("polarity_attention_gated", polarity, gated, (6, 13), channels)

    # Its sums over tokens follow one from another: it reads q and k three times.
    yield case("flow_attention", lambda device: FlowAttention(), packed, (8, 11), channels)

    def pair(noise: Noise) -> list[Tensor]:
        return [*noise(tokens, 2, heads, HEAD).unbind(2), noise(tokens, heads, HEAD)]

    yield case("hash_attention", partial(HashAttention, heads), pair, (3, 5), channels)
    mixed_states = partial(MixedStateAttention, size)
    yield case("mixed_state_attention", mixed_states, packed, (4, 9), channels)

    def parts(noise: Noise) -> list[Tensor]:
        # FaViT's: an eighth of the channels for the whole, the rest for two shares.
        sizes = (1, channels // 8), *[(heads, 7 * HEAD // 16)] * 2
        keys = [noise(49, h, n * width) for h, width in sizes for n in (2, 1)]
        return [noise(tokens, channels), *keys, noise(tokens, channels)]

    yield case("attention_of_parts", lambda _: AttentionOfParts(), parts, (2, 3), channels)
    hidden = channels * 7 // 2
    for name, dim, kernel, options in (
        ("depthwise_3x3", channels, 3, {}),
        ("depthwise_3x3_residual", channels, 3, {"residual": True}),
        ("depthwise_3x3_gelu_residual", hidden, 3, {"activation": "gelu", "residual": True}),
        ("depthwise_5x5", channels, 5, {}),
        ("depthwise_1x11", channels, (1, 11), {}),
        ("depthwise_11x1", channels, (11, 1), {}),
    ):

        def convolution(
            device: torch.device, dim: int = dim, kernel: Any = kernel, options: dict = options
        ) -> nn.Module:
            return Depthwise(dim, kernel, **options)

        def maps(noise: Noise, dim: int = dim) -> list[Tensor]:
            return [noise(height, width, dim), noise(height, width, dim)]

        yield case(name, convolution, maps, (2, 3), dim)


def mixers(resolution: int, batch: int) -> Iterator[Case]:
    """Cases of whole mixers at a resolution, each with its reference, and of gated softmax."""
    for stage, (stride, heads) in enumerate(STAGES):
        side = max(1, resolution // stride)
        size = (side, side)
        tokens, channels = size[0] * size[1], heads * HEAD
        one = batch * tokens * channels
        for name in (*MECHANISMS, "gated_softmax"):
            passes = (13 + (name == "rala"), 28)

            def build(
                device: torch.device, name: str = name, stage: int = stage, size: tuple = size
            ) -> nn.Module:
                return Mixer(name, stage, size)

            def inputs(noise: Noise, tokens: int = tokens, channels: int = channels) -> list:
                return [noise(tokens, channels), noise(tokens, channels)]

            case = Case(
                "mixers",
                name,
                "" if name in MECHANISMS else "rala",
                resolution,
                batch,
                f"{batch} x {size[0]} x {size[1]} x {channels}",
                build,
                inputs,
                (passes[0] * one, passes[1] * one),
            )
            yield case
            if name in MECHANISMS:
                yield replace(case, name="reference", peer_of=name, reference=True)


def model(name: str, resolution: int, batch: int, mixer: str | None = None) -> Case:
    """The case of a timm model at a resolution, without dropout, so that all steps are alike.

    Args:
        name: name of the model.
        resolution: side of the images in pixels.
        batch: number of images.
        mixer: name of the token mixer in all blocks of a model of linsight; None for the model's
            own mixers.
    """
    options: dict[str, Any] = {"mixer": mixer} if mixer and name in ZOO else {}

    def build(device: torch.device) -> nn.Module:
        try:
            built = timm.create_model(name, img_size=resolution, **options)
        except TypeError:  # convolutional networks take any size, and have no such argument
            built = timm.create_model(name)
        return disable_randomness(built)

    peer_of = "" if name in ZOO else "linsight"
    title = f"{name} mixer={mixer}" if options else name
    return Case("models", title, peer_of, resolution, batch, f"{batch} x {resolution}²", build)


def disable_randomness(model: nn.Module) -> nn.Module:
    """Turn dropout off, and perturb the parameters so that no branch is too weak to be checked."""
    with torch.no_grad():
        for parameter in model.parameters():
            # Layer scales of 1e-6 would hide whole branches from the check.
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    for part in model.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0
        elif isinstance(part, nn.Dropout | nn.Dropout2d):
            part.p = 0.0
    return model


def select(cases: Iterator[Case], patterns: list[str]) -> list[Case]:
    """The cases whose name, or whose peer's name, matches a pattern; all if there is no pattern."""
    return [
        case
        for case in cases
        if not patterns or any(fnmatch(case.peer_of or case.name, pattern) for pattern in patterns)
    ]
