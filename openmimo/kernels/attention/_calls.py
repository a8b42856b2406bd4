"""Shared by the two attention operations: the definition of decoding, refusals, and arguments of the C kernels.

N query heads; others as in `openmimo.kernels.attention`.
"""

import math
import struct
from collections.abc import Callable

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import (
    NO_BLOCKS,
    NO_SCORES,
    AttentionNeed,
    AttentionOut,
    ChosenBlocks,
    PagedNeed,
    Pages,
    UpdateNeed,
    scale_bytes,
)

MAX_DECODE_QUERIES = 16  # a call with at most these queries per sequence is decoding or verification
NO_WINDOW = 1 << 62  # the window of full attention, for the C kernels
MAX_PAGED_DIM = 256
PAGED_KEY_MULTIPLE, PAGED_VALUE_MULTIPLE = 16, 32
_CAUSAL = native.Function("openmimo_causal_attention", "8P11qd", num_arguments=2)  # `causal_call` of native/causal.c
_PAGED = native.Function("openmimo_paged_attention", "9P21q")  # `paged_call` of native/attention.c
MAX_INTEGER_DIMS = (1 << 24) // 127**2
_CHOSEN_QUERIES = 1024  # queries of a call of the C kernel, which bounds the memory of their tables


def refuse_blocks(need: AttentionNeed | PagedNeed) -> str | None:
    """Refuse calls that request block scores or read chosen blocks."""
    if need.score_block is not None:
        return NO_SCORES
    return None if need.chosen_block is None else NO_BLOCKS


def zero_scores(q_TNK: torch.Tensor, num_kv_heads: int, block: int | None, longest_key: int) -> torch.Tensor | None:
    """Return block scores [T, G, C] of zeros, which the C kernels raise; None without a block."""
    if block is None:
        return None
    return torch.zeros(q_TNK.shape[0], num_kv_heads, -(-longest_key // block))


def address(x: torch.Tensor | None) -> int:
    """Return the address of a tensor, 0 for None."""
    return 0 if x is None else x.data_ptr()


def packed_lengths(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> bytes:
    """Return the second argument of the C kernels: int64 query lengths, then key lengths."""
    return struct.pack(f"{2 * len(query_lengths)}q", *query_lengths, *key_lengths)


def float32_sink(sink_N: torch.Tensor | None) -> torch.Tensor | None:
    """Return the sink logits in the layout that the C kernels read."""
    return None if sink_N is None else sink_N.to(torch.float32).contiguous()


def refuse_integers(need: AttentionNeed) -> str | None:
    """Refuse calls in which no product may be computed in int8, and all but full attention without gradients."""
    if need.integers is None:
        return "the call does not allow products in int8"
    if need.needs_gradients:
        return "int8 attention is for inference: it has no backward pass"
    if need.window_keys is not None:
        return "it computes full attention only"
    if need.key_dim > MAX_INTEGER_DIMS:
        return f"float32 does not hold the sums of more than {MAX_INTEGER_DIMS} products of codes exactly"
    return refuse_blocks(need)


def call_causal_kernel(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    need: AttentionNeed,
    scale: float,
    *,
    key_means_BGK: torch.Tensor | None = None,
    value_scales_BG: torch.Tensor | None = None,
) -> AttentionOut:
    """Call native/causal.c, in int8 if the means of the keys are given.

    Raises:
        MemoryError: There is no memory for the kernel's layout of the keys.
    """
    q_TNK, k_SGK, v_SGV = q_TNK.contiguous(), k_SGK.contiguous(), v_SGV.contiguous()
    out_TNV = q_TNK.new_empty(*q_TNK.shape[:2], v_SGV.shape[2])
    sink_N = float32_sink(sink_N)
    scores_TGC = zero_scores(q_TNK, need.num_kv_heads, need.score_block, max(need.key_lengths))
    integers = 0 if key_means_BGK is None else 2 if need.integers == "full" else 1
    call = _CAUSAL.pack(
        q_TNK.data_ptr(),
        k_SGK.data_ptr(),
        v_SGV.data_ptr(),
        address(sink_N),
        out_TNV.data_ptr(),
        address(scores_TGC),
        address(key_means_BGK),
        address(value_scales_BG),
        *(len(need.query_lengths), need.num_heads, need.num_kv_heads, need.key_dim, need.value_dim),
        *(need.window_keys or NO_WINDOW, torch.get_num_threads(), q_TNK.dtype == torch.bfloat16),
        *(need.score_block or 1, 1 if scores_TGC is None else scores_TGC.shape[2], integers, scale),
    )
    if _CAUSAL.call(call, packed_lengths(need.query_lengths, need.key_lengths)):
        raise MemoryError(f"there is no memory to lay out {sum(need.key_lengths):,} keys for attention")
    return AttentionOut(out_TNV, scores_TGC)


def refuse_paged_dims(need: AttentionNeed | PagedNeed | UpdateNeed) -> str | None:
    """Refuse dims that are not whole vectors of native/attention.c."""
    dims_fit = need.key_dim % PAGED_KEY_MULTIPLE == need.value_dim % PAGED_VALUE_MULTIPLE == 0
    if dims_fit and max(need.key_dim, need.value_dim) <= MAX_PAGED_DIM:
        return None
    return (
        f"it takes key dims that are multiples of {PAGED_KEY_MULTIPLE} and value dims that are multiples of "
        f"{PAGED_VALUE_MULTIPLE}, up to {MAX_PAGED_DIM}, not {need.key_dim} and {need.value_dim}"
    )


def call_paged_kernel(
    q_TNK: torch.Tensor,
    pages: Pages,
    sink_N: torch.Tensor | None,
    query_lengths_B: torch.Tensor,
    key_lengths: torch.Tensor,
    *,
    run_positions: int,
    entry_positions: int = 1,
    window_keys: int | None = None,
    scale: float | None = None,
    score_block: int | None = None,
    longest_key: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call native/attention.c, whose first comment describes runs and entries; return its output and block scores.

    Args:
        q_TNK: Queries.
        pages: Keys and values; `tables_BY` has a third dimension, after the first, if each key/value head has a table.
        sink_N: Sink logits, or None.
        query_lengths_B: int32, queries of each sequence.
        key_lengths: int32, keys of each sequence, or of each sequence and key/value head.
        run_positions: Positions of a run.
        entry_positions: Factor of the page number in an entry of a table.
        window_keys: Keys that a query sees, its own included (None: all).
        scale: Factor of the logits (None: 1/sqrt(K)).
        score_block: Keys of a block, to request block scores.
        longest_key: The largest key length, of a call with block scores.

    Raises:
        MemoryError: There is no memory for the block scores.
        ValueError: The numbers of a cache position are not contiguous.
    """
    keys_XPGK, values_XPGV, tables = pages
    T, N, K = q_TNK.shape
    int8_cache, dtype = keys_XPGK.dtype == torch.int8, q_TNK.dtype
    G, V = values_XPGV.shape[2], values_XPGV.shape[3] - scale_bytes(keys_XPGK.dtype)
    if int8_cache:
        q_TNK = q_TNK.float()
    if scale is not None and scale != 1.0 / math.sqrt(K):
        q_TNK = q_TNK * (scale * math.sqrt(K))
    q_TNK, tables, sink_N = q_TNK.contiguous(), tables.contiguous(), float32_sink(sink_N)
    assert query_lengths_B.is_contiguous() and key_lengths.is_contiguous()
    out_TNV = q_TNK.new_empty(T, N, V)
    scores_TGC = zero_scores(q_TNK, G, score_block, longest_key)
    table_strides = (tables.stride(0), 0) if tables.ndim == 2 else tables.stride()[:2]
    call = _PAGED.pack(
        q_TNK.data_ptr(),
        keys_XPGK.data_ptr(),
        values_XPGV.data_ptr(),
        address(sink_N),
        out_TNV.data_ptr(),
        address(scores_TGC),
        tables.data_ptr(),
        query_lengths_B.data_ptr(),
        key_lengths.data_ptr(),
        *(query_lengths_B.shape[0], N, G, K, V),
        *(run_positions, entry_positions, *position_strides(keys_XPGK), *position_strides(values_XPGV), *table_strides),
        *((1, 0) if key_lengths.ndim == 1 else (G, 1)),
        *(window_keys or NO_WINDOW, torch.get_num_threads(), q_TNK.dtype == torch.bfloat16),
        *(score_block or 1, 1 if scores_TGC is None else scores_TGC.shape[2], int8_cache),
    )
    if _PAGED.call(call):
        raise MemoryError(f"there is no memory for the block scores of {longest_key:,} keys")
    return out_TNV if out_TNV.dtype == dtype else out_TNV.to(dtype), scores_TGC


def position_strides(x_XPGK: torch.Tensor) -> tuple[int, int]:
    """Return the strides of pages and positions, in elements. Raises ValueError if a position is not contiguous."""
    page, position, head, element = x_XPGK.stride()
    if element != 1 or head != x_XPGK.shape[3]:
        raise ValueError(f"the values of a cache position are not contiguous: strides {x_XPGK.stride()}")
    return page, position


def attend_chosen(
    q_TNK: torch.Tensor,
    keys_XPGK: torch.Tensor,
    values_XPGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    blocks: ChosenBlocks,
    *,
    own_T: torch.Tensor,
    run_positions: int,
    entries: Callable[[slice, torch.Tensor], torch.Tensor],
    scale: float | None = None,
) -> torch.Tensor:
    """Compute attention of each query to its chosen blocks with native/attention.c: a paged read of the blocks.

    Args:
        q_TNK: Queries.
        keys_XPGK: Pages of keys.
        values_XPGV: Pages of values.
        sink_N: Sink logits, or None.
        blocks: The blocks of each query.
        own_T: int64, the position of each query in its sequence.
        run_positions: Positions of a run; it divides a block.
        entries: Maps some of the queries, and positions [queries, G, Y] in their sequences, to entries of tables.
        scale: Factor of the logits (None: 1/sqrt(K)).
    """
    P, size = keys_XPGK.shape[1], blocks.size
    outputs = []
    for start in range(0, len(q_TNK), _CHOSEN_QUERIES):
        rows = slice(start, start + _CHOSEN_QUERIES)
        ids_TGJ, own_T11 = blocks.ids_TGJ[rows], own_T[rows, None, None]
        seen_TGJ = (own_T11 + 1 - ids_TGJ * size).clamp(max=size) * (ids_TGJ >= 0)
        position_TGY = (ids_TGJ[..., None] * size + torch.arange(0, size, run_positions)).flatten(2)
        position_TGY = torch.minimum(position_TGY.clamp_(min=0), own_T11)  # runs behind the last visible key are unread
        out_TNV, _ = call_paged_kernel(
            q_TNK[rows],
            Pages(keys_XPGK, values_XPGV, entries(rows, position_TGY)),
            sink_N,
            torch.ones(len(ids_TGJ), dtype=torch.int32),
            seen_TGJ.sum(2, dtype=torch.int32),
            run_positions=run_positions,
            entry_positions=P,
            scale=scale,
        )
        outputs.append(out_TNV)
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
