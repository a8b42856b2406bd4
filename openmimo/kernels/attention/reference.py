"""The definition: a dense masked softmax per sequence, in float32 or better. Refuses nothing; needs T x S memory.

T queries, S keys, N query heads, G key/value heads, R = N / G, K key dim, V value dim, C blocks of keys.
"""

import torch
import torch.nn.functional as F

from openmimo.kernels.attention import AttentionNeed, AttentionOut, ChosenBlocks
from openmimo.kernels.attention._tiles import chosen_mask
from openmimo.kernels.dispatch import Backend


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
    blocks: ChosenBlocks | None = None,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.attend`."""
    chosen = [None] * len(need.query_lengths) if blocks is None else blocks.ids_TGJ.split(need.query_lengths)
    queries = q_TNK.split(need.query_lengths)
    keys = k_SGK.split(need.key_lengths)
    values = v_SGV.split(need.key_lengths)
    outputs, scores = [], []
    for q, k, v, ids in zip(queries, keys, values, chosen, strict=True):
        out_TNV, probabilities_NTS = _one_sequence(q, k, v, sink_N, need, scale, ids)
        outputs.append(out_TNV)
        if need.score_block is not None:
            num_blocks = -(-max(need.key_lengths) // need.score_block)
            scores.append(_block_scores(probabilities_NTS, need.num_kv_heads, num_blocks, need.score_block))
    return AttentionOut(torch.cat(outputs), torch.cat(scores) if scores else None)


@torch.no_grad()
def _block_scores(probabilities_NTS: torch.Tensor, num_kv_heads: int, blocks: int, block: int) -> torch.Tensor:
    """Return the block scores [T, G, C] of one sequence, for `blocks` blocks of `block` keys."""
    padded_NTS = F.pad(probabilities_NTS, (0, blocks * block - probabilities_NTS.shape[2]))
    scores_NTC = padded_NTS.unflatten(2, (blocks, block)).amax(dim=3)
    return scores_NTC.unflatten(0, (num_kv_heads, -1)).amax(dim=1).transpose(0, 1)


def _one_sequence(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    need: AttentionNeed,
    scale: float,
    ids_TGJ: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [T, N, V] and the probabilities [N, T, S]."""
    T, N, _ = q_TNK.shape
    S, G, _ = k_SGK.shape
    dtype = torch.float64 if q_TNK.dtype == torch.float64 else torch.float32
    k_SNK = k_SGK.repeat_interleave(N // G, dim=1).to(dtype)
    v_SNV = v_SGV.repeat_interleave(N // G, dim=1).to(dtype)
    logits_NTS = torch.einsum("tnk,snk->nts", q_TNK.to(dtype), k_SNK) * scale
    distance_TS = torch.arange(S - T, S, device=q_TNK.device)[:, None] - torch.arange(S, device=q_TNK.device)[None, :]
    hidden_TS = (distance_TS < 0) & need.causal
    if need.window_keys is not None:
        hidden_TS = hidden_TS | (distance_TS.abs() >= need.window_keys)
    logits_NTS = logits_NTS.masked_fill(hidden_TS, float("-inf"))
    if ids_TGJ is not None:
        assert need.chosen_block is not None
        is_read_TGC = chosen_mask(ids_TGJ, -(-S // need.chosen_block))
        is_read_TGS = is_read_TGC.repeat_interleave(need.chosen_block, dim=2)[..., :S]
        logits_NTS = logits_NTS.masked_fill(
            ~is_read_TGS.repeat_interleave(N // G, dim=1).transpose(0, 1), float("-inf")
        )
    if sink_N is not None:
        sink_NT1 = sink_N.to(dtype)[:, None, None].expand(N, T, 1)
        logits_NTS = torch.cat([logits_NTS, sink_NT1], dim=-1)
    probabilities_NTS = logits_NTS.softmax(dim=-1)[..., :S]
    return torch.einsum("nts,snv->tnv", probabilities_NTS, v_SNV).to(q_TNK.dtype), probabilities_NTS


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
