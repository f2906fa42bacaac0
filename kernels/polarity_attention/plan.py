"""The launch decisions of the gradient of powers and scales."""

from ..runtime.launch import Launch, cache_plan, cdiv

# The tile that sums the parts.
ROWS, COLUMNS = 256, 16


@cache_plan
def plan(batch: int, heads: int, width: int, padded: int, splits: tuple[int, int]) -> Launch:
    """Plan for the parts of `splits` programs per head, through keys and through queries.

    Args:
        batch, heads, width: of the queries.
        padded: the width that the kernels of linear attention compute with.
        splits: programs per head of `key_gradient` and of `query_gradient`.
    """
    constants = {"D": width, "P": padded, "ROWS": ROWS, "BLOCK": COLUMNS, "num_warps": 4}
    # The last axis of the grid: powers, and scales.
    return Launch((heads, cdiv(width, COLUMNS), 2), (batch, *splits), constants)
