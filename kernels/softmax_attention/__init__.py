"""Softmax attention by PyTorch, or on a CPU in inference by products of oneDNN.

PyTorch's function pads heads in memory whose width is no multiple of 8, and gives each call a
result of its own. `attention_of_parts` has kernels for heads of any width that attend to few keys.
"""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import multiply, runs_onednn
from ..runtime.dispatch import WIDEST_HEAD, runs_triton
from . import operator, reference
from .reference import Attention

# The fewest keys, and the most threads, with which oneDNN's products win over PyTorch's kernel.
# That gives each thread rows of its own, where the threads of a product wait for each other.
LEAST_KEYS, MOST_THREADS = 512, 2
# The most elements of a piece of the attention map, which is to stay in the cache.
PIECE = 2**20
# The most keys that the kernels take: they are one tile, whose softmax is whole.
MOST_KEYS = 64
# The most shares that the kernels take.
MOST_SHARES = 2


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(D^-0.5 q k^T) v of tensors (B, heads, N, D), keys and values of as many tokens M."""
    if (
        query.is_cpu
        and query.ndim == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and key.shape[-2] >= LEAST_KEYS
        and torch.get_num_threads() <= MOST_THREADS
        and runs_onednn(query, key, value)
    ):
        return _by_products(query, key, value)
    if query.is_cuda and query.dtype == torch.float32:
        q, k, v = (align(x) for x in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, scale=query.shape[-1] ** -0.5)
        return _AlignedGradient.apply(y)[..., : value.shape[-1]]
    return F.scaled_dot_product_attention(query, key, value)


def align(x: Tensor) -> Tensor:
    """x with rows that begin at multiples of 16 bytes, and zeros behind channels of other widths.

    PyTorch has no float32 kernel for others on recent GPUs, and raises an error instead.
    """
    if x.shape[-1] % 4:
        x = F.pad(x, (0, -x.shape[-1] % 4))
    if torch.compiler.is_compiling():  # which cannot trace an offset
        return x.contiguous()
    # An axis of size 1 may have any step, and is checked, too.
    is_aligned = x.storage_offset() % 4 == 0 and all(step % 4 == 0 for step in x.stride()[:-1])
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


class _AlignedGradient(torch.autograd.Function):
    """The identity, whose gradient is aligned: a part of a concatenation hands back another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return align(grad)


def _by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, width = query.shape
    rows = max(32, min(256, PIECE // key.shape[-2]))
    # Tokens before heads in memory, as the next linear layer reads them.
    y = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    for head in product(range(batch), range(heads)):
        q, k, v, out = (x[head] for x in (query, key, value, y))
        k, v = (k * width**-0.5).contiguous(), v.t().contiguous()
        for piece, part in zip(q.split(rows), out.split(rows), strict=True):
            scores = multiply(piece, k)
            part.copy_(multiply(torch.softmax(scores, -1, out=scores), v))
    return y


def attention_of_parts(
    query: Tensor,
    whole: tuple[Tensor, Tensor],
    shares: Sequence[tuple[Tensor, Tensor]],
    attentions: Sequence[Attention] | None = None,
) -> Tensor:
    """softmax(D^-0.5 q k^T) (v + local) of parts of the channels, each with keys of its own.

    The factorised attention of FaViT (arXiv:2312.08614, section III): one head, the whole, whose
    keys are of a reduced map, and shares of the others, whose keys are of windows.

    Args:
        query: (B, N, C), any strides with the last axis contiguous: the channels of the whole,
            then for each head those of the shares, side by side.
        whole: keys and values, side by side, (B, M, 1, 2 D), and what is added to the values,
            (B, M, 1, D). All tensors have the dtype of `query`.
        shares: the same of each share, (B, M, heads, 2 D) and (B, M, heads, D), with other M and D,
            but the same of all shares. On CUDA more than 64 keys, heads wider than 128, float64
            and more than 2 shares are PyTorch's.
        attentions: what takes query, key and value (B, heads, N, D) in the place of softmax
            attention, for the whole and each share; the reference then runs.

    Returns:
        (B, N, C): the channels of the whole, then share by share those of its heads.

    Raises:
        ValueError: if shapes disagree.
    """
    _check_parts(query, whole, shares)
    if (
        attentions is not None
        or len(shares) > MOST_SHARES
        or not all(_fits(query, *part) for part in shares)
        or not runs_triton(query)
    ):
        attentions = attentions or [softmax_attention] * (1 + len(shares))
        return reference.attention_of_parts(query, whole, shares, attentions)
    tensors = [x for part in shares for x in part]
    tensors += [None] * (2 * MOST_SHARES - len(tensors))
    if _fits(query, *whole):
        return operator.attention_of_parts(query, *whole, *tensors)
    width = whole[0].shape[-1] // 2
    first, rest = query.split((width, query.shape[-1] - width), -1)
    key, value = whole[0].transpose(1, 2).chunk(2, -1)
    y = softmax_attention(first[:, None], key, value + whole[1].transpose(1, 2))[:, 0]
    return torch.cat((y, operator.attention_of_parts(rest, None, None, *tensors)), -1)


def _fits(query: Tensor, key_value: Tensor, local: Tensor) -> bool:
    return (
        1 <= local.shape[1] <= MOST_KEYS
        and local.shape[3] <= WIDEST_HEAD
        and query.dtype == key_value.dtype == local.dtype
    )


def _check_parts(
    query: Tensor, whole: tuple[Tensor, Tensor], shares: Sequence[tuple[Tensor, Tensor]]
) -> None:
    if query.ndim != 3:
        raise ValueError(f"query has shape {tuple(query.shape)}, expected (B, N, C)")
    if not shares:
        raise ValueError("shares is empty, expected keys and values of one share or more")
    keys, heads, width = shares[0][1].shape[1:]
    names = ["whole", *(f"shares[{number}]" for number in range(len(shares)))]
    reduced, single = whole[1].shape[1], whole[1].shape[-1]
    sizes = [(reduced, 1, single), *[(keys, heads, width)] * len(shares)]
    for name, (key_value, local), size in zip(names, (whole, *shares), sizes, strict=True):
        wanted = (query.shape[0], *size)
        if local.shape != wanted or key_value.shape != (*wanted[:3], 2 * wanted[3]):
            raise ValueError(
                f"{name} has shapes {tuple(key_value.shape)} and {tuple(local.shape)}, expected "
                f"{(*wanted[:3], 2 * wanted[3])} and {wanted}"
            )
    channels = single + len(shares) * heads * width
    if query.shape[-1] != channels:
        raise ValueError(f"query has {query.shape[-1]} channels, expected {channels}, of all parts")
