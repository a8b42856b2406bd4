"""Decoding: a few new queries a sequence against its cached keys. Inference only.

The query heads that read one key/value head, times the queries, are the rows of one matrix product with the cache,
which is read in place and never repeated. Where a call has several sequences and few keys each, the cost is not the
arithmetic but the number of steps, so their keys are gathered into one batch of products.

Shapes as in `_tiles`: a sequence is a tile (J sequences, B queries each).
"""

from collections.abc import Callable

import torch

from openmimo.kernels.attention import AttentionNeed
from openmimo.kernels.attention._tiles import pack_rows, scaled_product, unpack_rows
from openmimo.kernels.dispatch import Backend

MAX_QUERIES = 16
MAX_GATHERED_NUMBERS = 1 << 18


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> torch.Tensor:
    """See `openmimo.kernels.attention.attend`."""
    seen = [_keys_seen(need, sequence) for sequence in range(len(need.key_lengths))]
    numbers_a_key = need.num_kv_heads * (need.key_dim + need.value_dim)
    same_queries = len(set(need.query_lengths)) == 1
    if len(seen) > 1 and same_queries and max(seen) * numbers_a_key <= MAX_GATHERED_NUMBERS:
        return _gathered(q_TNK, k_SGK, v_SGV, sink_N, max(seen), need, scale)
    outputs = []
    keys, values = k_SGK.split(need.key_lengths), v_SGV.split(need.key_lengths)
    for q, k, v, count in zip(q_TNK.split(need.query_lengths), keys, values, seen, strict=True):
        k_GCK, v_GCV = k[len(k) - count :].transpose(0, 1), v[len(v) - count :].transpose(0, 1)
        hidden_JBC = _hidden(len(q), count, torch.tensor([count]), need.window_keys).to(q.device)
        outputs.append(_attend(q, k_GCK, v_GCV, sink_N, hidden_JBC, scale, _head_by_head))
    return torch.cat(outputs)


def refuse(need: AttentionNeed) -> str | None:
    """A few queries a sequence, no gradients."""
    if need.needs_gradients:
        return "it has no backward pass"
    if max(need.query_lengths) > MAX_QUERIES:
        return f"it is for at most {MAX_QUERIES} queries a sequence, not {max(need.query_lengths)}"
    return None


def _keys_seen(need: AttentionNeed, sequence: int) -> int:
    """How many of the last keys of a sequence any of its queries may see."""
    keys = need.key_lengths[sequence]
    if need.window_keys is None:
        return keys
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
    """All sequences at once: the last `columns` keys of each, short ones filled up with keys that the mask hides."""
    lengths_J = torch.tensor(need.key_lengths)
    key_JC = (lengths_J.cumsum(0)[:, None] - columns + torch.arange(columns)).clamp_(min=0)
    head_JGC = key_JC[:, None, :] * need.num_kv_heads + torch.arange(need.num_kv_heads)[:, None]
    row_X = head_JGC.flatten().to(q_TNK.device)
    k_LCK = k_SGK.flatten(0, 1).index_select(0, row_X).view(-1, columns, need.key_dim)
    v_LCV = v_SGV.flatten(0, 1).index_select(0, row_X).view(-1, columns, need.value_dim)
    hidden_JBC = _hidden(need.query_lengths[0], columns, lengths_J, need.window_keys)
    return _attend(q_TNK, k_LCK, v_LCV, sink_N, hidden_JBC.to(q_TNK.device), scale, scaled_product)


def _hidden(queries: int, columns: int, lengths_J: torch.Tensor, window_keys: int | None) -> torch.Tensor:
    """Which columns a query may not see, [J, B, C]; the last column is the own key of the last query."""
    column_C = torch.arange(columns)
    own_B1 = torch.arange(columns - queries, columns)[:, None]
    hidden_BC = column_C > own_B1
    if window_keys is not None:
        hidden_BC |= column_C <= own_B1 - window_keys
    return hidden_BC | (column_C < columns - lengths_J[:, None, None])


def _attend(
    q_TNK: torch.Tensor,
    k_LCK: torch.Tensor,
    v_LCV: torch.Tensor,
    sink_N: torch.Tensor | None,
    hidden_JBC: torch.Tensor,
    scale: float,
    product: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
) -> torch.Tensor:
    num_sequences, block, columns = hidden_JBC.shape
    heads = {"block": block, "num_kv_heads": len(k_LCK) // num_sequences}
    logits_LMC = product(pack_rows(q_TNK, **heads), k_LCK.transpose(1, 2), scale)
    logits_JNBC = logits_LMC.view(num_sequences, -1, block, columns)
    logits_JNBC.masked_fill_(hidden_JBC[:, None], float("-inf"))
    if sink_N is not None:
        sink_JNB1 = sink_N.to(logits_JNBC.dtype)[:, None, None].expand(num_sequences, -1, block, 1)
        logits_JNBC = torch.cat([logits_JNBC, sink_JNB1], dim=-1)
    probabilities_JNBC = torch.softmax(logits_JNBC, dim=-1)[..., :columns]
    out_LMV = product(probabilities_JNBC.reshape(logits_LMC.shape), v_LCV, 1.0)
    out_TNV = q_TNK.new_empty(*q_TNK.shape[:2], v_LCV.shape[2])
    unpack_rows(out_LMV, out_TNV, **heads)
    return out_TNV


def _head_by_head(a_LMX: torch.Tensor, b_LXC: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * a b, one key/value head after another: a batched product would first copy heads that are interleaved."""
    out_LMC = a_LMX.new_empty(a_LMX.shape[0], a_LMX.shape[1], b_LXC.shape[2])
    for a_MX, b_XC, out_MC in zip(a_LMX, b_LXC, out_LMC, strict=True):
        torch.addmm(out_MC, a_MX, b_XC, beta=0, alpha=scale, out=out_MC)
    return out_LMC


PLUGIN = Backend(rank=5, run=run, refuse=refuse)
