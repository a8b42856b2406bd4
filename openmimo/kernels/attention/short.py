"""Many short sequences on a CPU: padded batches replace a loop over sequences.

For prompts and responses of a few dozen tokens, as in rollouts and in training on them. Sequences whose numbers of
queries round up to the same power of two share a batch. A mask hides padding, keys outside the window, and later keys.
Autograd computes the gradients.

B sequences of a batch, Q queries and S keys of each (padded), R query heads of a key/value head; T, N, G, K, V as in
`openmimo.kernels.attention`.
"""

import torch

from openmimo.kernels.attention import AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import refuse_blocks
from openmimo.kernels.dispatch import Backend

MIN_SEQUENCES = 8
MAX_KEYS = 128
MAX_LOGITS = 1 << 25


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
    query_lengths, key_lengths = torch.tensor(need.query_lengths), torch.tensor(need.key_lengths)
    query_starts, key_starts = query_lengths.cumsum(0) - query_lengths, key_lengths.cumsum(0) - key_lengths
    outputs, rows = [], []
    for members in _by_size(query_lengths):
        queries_B, keys_B = query_lengths[members], key_lengths[members]
        columns_Q, columns_S = torch.arange(int(queries_B.max())), torch.arange(int(keys_B.max()))
        is_query_BQ = columns_Q < queries_B[:, None]
        query_BQ = (query_starts[members][:, None] + columns_Q).where(is_query_BQ, 0)
        key_BS = (key_starts[members][:, None] + columns_S).where(columns_S < keys_B[:, None], 0)
        position_BQ1 = (keys_B - queries_B)[:, None, None] + columns_Q[:, None]
        last_BQ1 = position_BQ1 if need.causal else (keys_B - 1)[:, None, None].expand_as(position_BQ1)
        seen_BQS = columns_S <= last_BQ1
        if need.window_keys is not None:
            seen_BQS &= (columns_S - position_BQ1).abs() < need.window_keys
        seen_BQS |= ~is_query_BQ[:, :, None]  # padding may see any key; its output is dropped
        out_BQNV = _attend_batch(q_TNK[query_BQ], k_SGK[key_BS], v_SGV[key_BS], sink_N, seen_BQS, scale)
        outputs.append(out_BQNV[is_query_BQ])
        rows.append(query_BQ[is_query_BQ])
    return AttentionOut(torch.cat(outputs)[torch.cat(rows).argsort()])


def _by_size(query_lengths: torch.Tensor) -> list[torch.Tensor]:
    """Group the indices of sequences by their number of queries, rounded up to a power of two."""
    sizes = query_lengths.clamp(min=1).double().log2().ceil()
    return [torch.nonzero(sizes == size).squeeze(1) for size in sizes.unique().tolist()]


def _attend_batch(
    q_BQNK: torch.Tensor,
    k_BSGK: torch.Tensor,
    v_BSGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    seen_BQS: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    B, Q, N, K = q_BQNK.shape
    S, G = k_BSGK.shape[1:3]
    wide = torch.float64 if q_BQNK.dtype == torch.float64 else torch.float32
    q_BGMK = q_BQNK.view(B, Q, G, N // G, K).permute(0, 2, 3, 1, 4).reshape(B * G, -1, K)
    k_BGSK, v_BGSV = (x.transpose(1, 2).reshape(B * G, S, -1) for x in (k_BSGK, v_BSGV))
    logits_BNQS = (torch.bmm(q_BGMK, k_BGSK.transpose(1, 2)).to(wide) * scale).view(B, N, Q, S)
    logits_BNQS = logits_BNQS.masked_fill(~seen_BQS[:, None], float("-inf"))
    if sink_N is not None:
        sink_BNQ1 = sink_N.to(wide).view(1, N, 1, 1).expand(B, N, Q, 1)
        logits_BNQS = torch.cat([logits_BNQS, sink_BNQ1], dim=-1)
    probabilities_BNQS = logits_BNQS.softmax(dim=-1)[..., :S].to(v_BSGV.dtype)
    out_BGMV = torch.bmm(probabilities_BNQS.reshape(B * G, -1, S), v_BGSV)
    return out_BGMV.view(B, N, Q, -1).transpose(1, 2)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse all but many short sequences on a CPU: otherwise padding costs more than it saves."""
    if reason := refuse_blocks(need):
        return reason
    if not need.on_cpu:
        return "it runs on CPUs only"
    if len(need.query_lengths) < MIN_SEQUENCES or max(need.key_lengths) > MAX_KEYS:
        return f"it takes at least {MIN_SEQUENCES} sequences of at most {MAX_KEYS} keys"
    if min(need.query_lengths) < 1:
        return "a sequence has no query"
    if len(need.query_lengths) * need.num_heads * max(need.query_lengths) * max(need.key_lengths) > MAX_LOGITS:
        return "the logits of the padded batch take too much memory"
    return None


PLUGIN = Backend(priority=50, run=run, refuse=refuse)
