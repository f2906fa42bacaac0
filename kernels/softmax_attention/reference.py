"""The reference of `attention_of_parts`, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_of_parts(
    query: Tensor,
    whole: tuple[Tensor, Tensor],
    shares: Sequence[tuple[Tensor, Tensor]],
    attentions: Sequence[Attention] | None = None,
) -> Tensor:
    """Cut the queries up, attend with each part, and concatenate; see the public function.

    Args:
        attentions: what attends with the whole and with each share, by default PyTorch's function.
    """
    width = whole[0].shape[-1] // 2
    first, rest = query.split((width, query.shape[-1] - width), -1)
    heads = shares[0][0].shape[2]
    rest = rest.unflatten(-1, (heads, len(shares), -1)).permute(3, 0, 2, 1, 4)
    outputs = []
    for number, (q, (key_value, local)) in enumerate(
        zip((first[:, None], *rest), (whole, *shares), strict=True)
    ):
        attention = attentions[number] if attentions else F.scaled_dot_product_attention
        key, value = key_value.transpose(1, 2).chunk(2, -1)
        y = attention(q, key, value + local.transpose(1, 2))
        outputs.append(y.transpose(1, 2).flatten(2))
    return torch.cat(outputs, -1)
