"""Shared by the two attention operations: the definition of decoding, and arguments of the C kernels.

N query heads.
"""

import struct

import torch

MAX_DECODE_QUERIES = 16  # a call with at most these queries per sequence is decoding or verification
NO_WINDOW = 1 << 62  # the window of full attention, for the C kernels


def packed_lengths(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> bytes:
    """Return the second argument of the C kernels: int64 query lengths, then key lengths."""
    return struct.pack(f"{2 * len(query_lengths)}q", *query_lengths, *key_lengths)


def float32_sink(sink_N: torch.Tensor | None) -> torch.Tensor | None:
    """Return the sink logits in the layout that the C kernels read."""
    return None if sink_N is None else sink_N.to(torch.float32).contiguous()
