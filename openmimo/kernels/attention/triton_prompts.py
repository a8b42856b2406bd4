"""Prompts on an accelerator: one kernel for all sequences of a pass, whatever their lengths, windows and sinks."""

import functools

import numpy as np
import torch

from openmimo.kernels.attention import CAUSAL_ONLY, NO_SCORES, AttentionNeed, AttentionOut
from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.runtime.device import uploaded

_MAX_DIMS = 256  # of a key or a value
TILE_ROWS = 128  # queries times query heads of a key/value head


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.attend`."""
    from openmimo.kernels.attention._triton_prompts import attend_tiles

    tile_queries = TILE_ROWS >> (need.num_heads // need.num_kv_heads - 1).bit_length()
    tiles_X5 = _tiles(need.query_lengths, need.key_lengths, tile_queries, q_TNK.device)
    out_TNV = attend_tiles(
        q_TNK, k_SGK, v_SGV, sink_N, tiles_X5, tile_queries=tile_queries, scale=scale, window_keys=need.window_keys
    )
    return AttentionOut(out_TNV)


@functools.lru_cache(maxsize=8)  # all layers of a pass use the same lengths
@torch.inference_mode(False)
def _tiles(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], tile_queries: int, device: torch.device
) -> torch.Tensor:
    """Return the tiles of a pass, those with the most keys first, int32 [tiles, 5].

    A tile has its first query in the pass, the end of its sequence's queries, the first key of its sequence, the
    position of its first query, and the number of keys of its sequence.
    """
    queries_B, keys_B = np.array(query_lengths), np.array(key_lengths)
    counts_B = -(-queries_B // tile_queries)
    sequence_X = np.repeat(np.arange(len(queries_B)), counts_B)
    number_X = np.arange(len(sequence_X)) - np.repeat(counts_B.cumsum() - counts_B, counts_B)
    offset_X = number_X * tile_queries
    position_X = (keys_B - queries_B)[sequence_X] + offset_X
    ends_B = queries_B.cumsum()
    columns = (
        (ends_B - queries_B)[sequence_X] + offset_X,
        ends_B[sequence_X],
        (keys_B.cumsum() - keys_B)[sequence_X],
        position_X,
        keys_B[sequence_X],
    )
    tiles_X5 = np.stack(columns, axis=1)[np.argsort(-position_X, kind="stable")]
    return uploaded(tiles_X5.tolist(), torch.int32, device)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse training, block scores, attention to later keys, and large heads."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients:
        return "it has no backward pass"
    if need.score_block is not None:
        return NO_SCORES
    if not need.causal:
        return CAUSAL_ONLY
    if max(need.key_dim, need.value_dim) > _MAX_DIMS:
        return f"its heads have up to {_MAX_DIMS} dims"
    if need.num_heads // need.num_kv_heads > TILE_ROWS:
        return f"a tile has {TILE_ROWS} rows, and the query heads of a key/value head are more"
    return None


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
