"""Shared by the two attention operations: the definition of decoding, refusals, and arguments of the C kernels.

N query heads.
"""

import struct

import torch

from openmimo.kernels.attention import NO_BLOCKS, NO_SCORES, AttentionNeed, PagedNeed

MAX_DECODE_QUERIES = 16  # a call with at most these queries per sequence is decoding or verification
NO_WINDOW = 1 << 62  # the window of full attention, for the C kernels


def refuse_blocks(need: AttentionNeed | PagedNeed) -> str | None:
    """Refuse calls that request block scores or read chosen blocks."""
    if need.score_block is not None:
        return NO_SCORES
    return None if need.chosen_block is None else NO_BLOCKS


def packed_lengths(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> bytes:
    """Return the second argument of the C kernels: int64 query lengths, then key lengths."""
    return struct.pack(f"{2 * len(query_lengths)}q", *query_lengths, *key_lengths)


def float32_sink(sink_N: torch.Tensor | None) -> torch.Tensor | None:
    """Return the sink logits in the layout that the C kernels read."""
    return None if sink_N is None else sink_N.to(torch.float32).contiguous()
