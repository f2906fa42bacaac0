"""The launch decisions of `column_sum`."""

from dataclasses import dataclass

import torch

from ..runtime.launch import Launch, cache_plan, cdiv, count_multiprocessors

WARPS = 4
# The tile of the first stage: of 16-bit rows, 128 bytes of each. Programs per multiprocessor, and
# tiles that each of them fetches ahead: enough bytes under way to fill the memory's pipe.
ROWS, COLUMNS, RESIDENT, STAGES = 64, 64, 4, 3
# That of the second, which has few rows in float32 and is short: many programs of one or two steps.
PART_ROWS, PART_COLUMNS = 256, 16


@dataclass(frozen=True)
class Plan:
    """The launches of both stages, and the shape of the parts between them."""

    sum_rows: Launch
    sum_parts: Launch
    parts: tuple[int, int]


@cache_plan
def plan(shape: torch.Size, device: torch.device) -> Plan:
    """Plan for rows of one shape (N, C)."""
    count, channels = shape
    blocks = cdiv(channels, COLUMNS)
    tiles = max(1, cdiv(count, ROWS))
    # All programs start at once, and share the tiles out evenly.
    most = max(1, RESIDENT * count_multiprocessors(device) // max(1, blocks))
    per = cdiv(tiles, most)
    splits = cdiv(tiles, per)
    return Plan(
        sum_rows=Launch(
            (blocks, splits),
            (count, per * ROWS, channels),
            {"ROWS": ROWS, "COLUMNS": COLUMNS, "STAGES": STAGES, "num_warps": WARPS},
        ),
        sum_parts=Launch(
            (cdiv(channels, PART_COLUMNS), 1),
            (splits, splits, channels),
            {"ROWS": PART_ROWS, "COLUMNS": PART_COLUMNS, "STAGES": 1, "num_warps": WARPS},
        ),
        parts=(splits, channels),
    )
