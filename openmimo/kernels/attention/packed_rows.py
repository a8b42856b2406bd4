"""Decoding: a few new queries per sequence against its cached keys. Inference only.

The queries of all query heads that read one key/value head are the rows of one matrix product with the cache, which is
read in place and never repeated. A call with several sequences and few keys each is bound by the number of torch calls,
not by arithmetic, so `_gathered` copies the keys into one batch of products.

Shapes as in `_tiles`: a sequence is a tile (J sequences, B queries each).
"""

import functools

import torch

from openmimo.kernels.attention import CAUSAL_ONLY, AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import MAX_DECODE_QUERIES, refuse_blocks
from openmimo.kernels.attention._tiles import pack_rows, scaled_product, unpack_rows, whole_columns
from openmimo.kernels.dispatch import Backend

MAX_GATHERED_NUMBERS = 1 << 18


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
    if len(need.query_lengths) == 1:
        return AttentionOut(_one_sequence(q_TNK, k_SGK, v_SGV, sink_N, need.window_keys, scale))
    columns = [_columns(need, sequence) for sequence in range(len(need.key_lengths))]
    values_per_key = need.num_kv_heads * (need.key_dim + need.value_dim)
    same_queries = len(set(need.query_lengths)) == 1
    if same_queries and max(columns) * values_per_key <= MAX_GATHERED_NUMBERS:
        return AttentionOut(_gathered(q_TNK, k_SGK, v_SGV, sink_N, max(columns), need, scale))
    queries, keys = q_TNK.split(need.query_lengths), k_SGK.split(need.key_lengths)
    values = v_SGV.split(need.key_lengths)
    outputs = [
        _one_sequence(q, k, v, sink_N, need.window_keys, scale) for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return AttentionOut(torch.cat(outputs))


def _one_sequence(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    window_keys: int | None,
    scale: float,
) -> torch.Tensor:
    """Compute attention of one sequence with few torch calls, because decoding makes them per layer and token."""
    if window_keys is not None and len(k_SGK) >= len(q_TNK) + window_keys:
        seen = len(q_TNK) + window_keys - 1
        k_SGK, v_SGV = k_SGK[-seen:], v_SGV[-seen:]
    T, N, K = q_TNK.shape
    S, G, V = v_SGV.shape
    q_TGRK = q_TNK.view(T, G, N // G, K)
    rows_GMK = q_TGRK[0] if T == 1 else q_TGRK.permute(1, 2, 0, 3).reshape(G, -1, K)
    logits_GMS = torch.baddbmm(q_TNK.new_empty(()), rows_GMK, k_SGK.permute(1, 2, 0), beta=0, alpha=scale)
    logits_GMS = logits_GMS.to(torch.promote_types(logits_GMS.dtype, torch.float32))
    if window_keys is not None and window_keys < S:
        logits_GMS.view(G, N // G, T, S).masked_fill_(_hidden_from(T, S, window_keys, q_TNK.device), float("-inf"))
    elif T > 1:  # only the last T keys are hidden from any query
        newest_GRTT = logits_GMS.view(G, N // G, T, S)[..., S - T :]
        newest_GRTT.masked_fill_(_hidden_from(T, T, None, q_TNK.device), float("-inf"))
    if sink_N is not None:
        sink_GR1 = sink_N.to(logits_GMS.dtype).view(G, -1, 1)
        logits_GMS = torch.cat([logits_GMS, sink_GR1.repeat_interleave(T, dim=1) if T > 1 else sink_GR1], dim=-1)
    probabilities_GMS = logits_GMS.softmax(dim=-1)[..., :S].to(v_SGV.dtype)
    out_GMV = torch.bmm(probabilities_GMS, v_SGV.transpose(0, 1))
    return out_GMV.view(G, N // G, T, V).permute(2, 0, 1, 3).reshape(T, N, V)


@functools.lru_cache(maxsize=64)
def _hidden_from(queries: int, keys: int, window_keys: int | None, device: torch.device) -> torch.Tensor:
    """Return whether each key of a sequence is hidden from each of its last queries, bool [T, S].

    Cached masks are small: callers pass S <= T + window for a window and S = T without one.
    """
    distance_TS = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    hidden_TS = distance_TS < 0
    return hidden_TS if window_keys is None else hidden_TS | (distance_TS >= window_keys)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse gradients and more than a few queries per sequence."""
    if reason := refuse_blocks(need):
        return reason
    if not need.causal:
        return CAUSAL_ONLY
    if need.needs_gradients:
        return "it has no backward pass"
    if max(need.query_lengths) > MAX_DECODE_QUERIES:
        return f"it takes at most {MAX_DECODE_QUERIES} queries a sequence, not {max(need.query_lengths)}"
    return None


def _columns(need: AttentionNeed, sequence: int) -> int:
    """Return the number of trailing keys of a sequence against which its queries are computed."""
    keys = need.key_lengths[sequence]
    if need.window_keys is None:
        return whole_columns(keys)
    return min(keys, need.query_lengths[sequence] + need.window_keys - 1)


def _gathered(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    columns: int,
    need: AttentionNeed,
    scale: float,
) -> torch.Tensor:
    """Compute attention of each sequence to the `columns` keys of the pack that end with its last, in one batch.

    Right-aligning the sequences needs no padding. For a shorter sequence the range starts in the sequence before it (or
    is clamped to key 0), and the mask hides those columns:

        pack       a a a b b b b b          columns = 4
        tile a     0 a a a                  key 0 stands in for a column before the pack
        tile b     b b b b
    """
    lengths_J = torch.tensor(need.key_lengths)
    key_JC = (lengths_J.cumsum(0)[:, None] - columns + torch.arange(columns)).clamp_(min=0)
    head_JGC = key_JC[:, None, :] * need.num_kv_heads + torch.arange(need.num_kv_heads)[:, None]
    row_X = head_JGC.flatten().to(q_TNK.device)
    k_LCK = k_SGK.flatten(0, 1).index_select(0, row_X).view(-1, columns, need.key_dim)
    v_LCV = v_SGV.flatten(0, 1).index_select(0, row_X).view(-1, columns, need.value_dim)
    last_J = torch.full_like(lengths_J, columns - 1)
    hidden_JBC = _hidden(need.query_lengths[0], columns, last_J, columns - lengths_J, need.window_keys)
    return _attend(q_TNK, k_LCK, v_LCV, sink_N, hidden_JBC.to(q_TNK.device), scale)


def _hidden(
    queries: int, columns: int, last_J: torch.Tensor, first_J: torch.Tensor, window_keys: int | None
) -> torch.Tensor:
    """Return whether each column is hidden from each query, bool [J, B, C].

    Args:
        queries: B.
        columns: C.
        last_J: Column of the last query's own key; earlier queries have the columns before it.
        first_J: Column of the first key of the sequence.
        window_keys: Keys that a query sees, its own included (None: all).
    """
    column_C = torch.arange(columns)
    last_JB1 = last_J[:, None, None] - torch.arange(queries - 1, -1, -1)[:, None]
    hidden_JBC = (column_C > last_JB1) | (column_C < first_J[:, None, None])
    if window_keys is not None:
        hidden_JBC |= column_C <= last_JB1 - window_keys
    return hidden_JBC


def _attend(
    q_TNK: torch.Tensor,
    k_LCK: torch.Tensor,
    v_LCV: torch.Tensor,
    sink_N: torch.Tensor | None,
    hidden_JBC: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    num_sequences, block, columns = hidden_JBC.shape
    heads = {"block": block, "num_kv_heads": len(k_LCK) // num_sequences}
    logits_LMC = scaled_product(pack_rows(q_TNK, **heads), k_LCK.transpose(1, 2), scale)
    logits_JNBC = logits_LMC.view(num_sequences, -1, block, columns)
    logits_JNBC.masked_fill_(hidden_JBC[:, None], float("-inf"))
    if sink_N is not None:
        sink_JNB1 = sink_N.to(logits_JNBC.dtype)[:, None, None].expand(num_sequences, -1, block, 1)
        logits_JNBC = torch.cat([logits_JNBC, sink_JNB1], dim=-1)
    probabilities_JNBC = torch.softmax(logits_JNBC, dim=-1)[..., :columns]
    out_LMV = scaled_product(probabilities_JNBC.reshape(logits_LMC.shape), v_LCV, 1.0)
    out_TNV = q_TNK.new_empty(*q_TNK.shape[:2], v_LCV.shape[2])
    unpack_rows(out_LMV, out_TNV, **heads)
    return out_TNV


PLUGIN = Backend(priority=60, run=run, refuse=refuse)
