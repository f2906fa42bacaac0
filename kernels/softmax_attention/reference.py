"""The reference of `attention_of_parts`, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_of_parts(
    query: Tensor,
    whole: tuple[Tensor, Tensor],
    shares: Sequence[tuple[Tensor, Tensor]],
    attentions: Sequence[Attention],
) -> Tensor:
    """Cut the queries up, attend with each part, and concatenate; see the public function.

    Args:
        attentions: what attends with the whole and with each share.
    """
    width = whole[0].shape[-1] // 2
    first, rest = query.split((width, query.shape[-1] - width), -1)
    heads = shares[0][0].shape[2]
    rest = rest.unflatten(-1, (heads, len(shares), -1)).permute(3, 0, 2, 1, 4)
    outputs = []
    for q, (key_value, local), attention in zip(
        (first[:, None], *rest), (whole, *shares), attentions, strict=True
    ):
        key, value = key_value.transpose(1, 2).chunk(2, -1)
        y = attention(q, key, value + local.transpose(1, 2))
        outputs.append(y.transpose(1, 2).flatten(2))
    return torch.cat(outputs, -1)
