"""Softmax attention by PyTorch, or on a CPU in inference by products of oneDNN."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import multiply, runs_onednn

# The fewest keys, and the most threads, with which oneDNN's products win over PyTorch's kernel.
# That gives each thread rows of its own, where the threads of a product wait for each other.
LEAST_KEYS, MOST_THREADS = 512, 2
# The most elements of a piece of the attention map, which is to stay in the cache.
PIECE = 2**20


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
    return F.scaled_dot_product_attention(query, key, value)


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
