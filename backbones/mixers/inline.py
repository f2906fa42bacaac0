"""InLine attention (arXiv:2412.06590, NeurIPS 2024): injective, with a local residual."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.depthwise_conv2d import depthwise_conv2d
from ...kernels.linear_attention import linear_attention
from ..context import Context, Place
from ..layers import DepthwiseConv2d
from .base import TokenMixer, register_mixer
from .projected import join_projections, rename_entries

KERNEL = 3


@register_mixer("inline")
class InLine(TokenMixer):
    """Linear attention normalised by subtraction, and a convolution whose kernels are predicted.

    y_i = s q_i K^T V / N + (1 - s q_i . mean(k)) mean(v) with s = D^-0.5, so that the weights of
    each query sum to one (eq. 7). A depthwise 3 x 3 convolution of the values is added, whose
    kernels are predicted for each image from the mean of its tokens (section 4.2).

    Args:
        place: where the mixer stands.
        predict_from: the tokens from whose mean the kernels are predicted: 'input', the mixer's
            input, or 'stream', the residual stream, from which a norm made the input.
        local_kernel: size of a further depthwise convolution of the values, whose kernels are
            learned, odd; 0 for no such convolution.
    """

    def __init__(
        self,
        place: Place,
        *,
        predict_from: Literal["input", "stream"] = "input",
        local_kernel: int = 0,
    ) -> None:
        super().__init__()
        dim, heads = place.dim, place.num_heads
        self.num_heads = heads
        self.prefix_tokens = place.prefix_tokens
        self.predict_from = predict_from
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.predictor = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=heads),
            nn.GELU(),
            nn.Conv1d(dim, KERNEL * KERNEL * dim, 1, groups=heads),
        )
        self.local = DepthwiseConv2d(dim, local_kernel) if local_kernel else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        source = x
        if self.predict_from == "stream" and context.stream is not None:
            source = context.stream
        kernels = self.predictor(source.mean(1)[..., None])
        blocks = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = blocks.unbind(2)
        query, key = context.rotate(query), context.rotate(key)
        image = value.flatten(2)[:, self.prefix_tokens :].unflatten(1, context.size)
        local = depthwise_conv2d(image, kernels.unflatten(1, (-1, KERNEL, KERNEL)).squeeze(-1))
        if self.local is not None:
            local = local + self.local(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        local = local.flatten(1, 2)
        if self.prefix_tokens:
            local = F.pad(local, (0, 0, self.prefix_tokens, 0))
        y = linear_attention(
            query,
            key,
            value,
            feature_map="identity",
            readout="subtractive",
            local=local.unflatten(-1, (self.num_heads, -1)),
        )
        return self.out_proj(y.flatten(2))

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' projections, predictor and local branch, renamed."""
        names = {"residual.": "predictor.", "get_v.": "local."}
        return rename_entries(join_projections(entries), names)
