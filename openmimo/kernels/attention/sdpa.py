"""Full attention through `F.scaled_dot_product_attention`: accelerators only, cuDNN before flash.

On the CPU that call materializes T x T logits if key and value dims differ, so this backend refuses there.
"""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from openmimo.core.errors import ConfigError
from openmimo.kernels.attention import AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import refuse_blocks
from openmimo.kernels.dispatch import Backend
from openmimo.runtime.device import has_fused_attention, uploaded

_MAX_PADDED = 1024  # tokens; for longer sequences, padding costs more than a call
# cuDNN refuses sequences of one token, so short sequences may use MATH, which holds T x T logits (16.6 GiB against
# 0.6 GiB at 4,096 tokens and 64 heads). A longer call that the other three refuse is refused.
_SHORT = 64  # tokens
PREFERRED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.attend`.

    Sequences of equal length are one batch. Other sequences are padded to the next power of two, one batch for each,
    except that those above `_MAX_PADDED` tokens share a batch only with sequences of the same length. Padding is
    behind the last query, so the causal mask hides it. Without that mask, each sequence is a call.
    """
    lengths = need.query_lengths
    if len(set(lengths)) == 1:
        return AttentionOut(_batch(q_TNK, k_SGK, v_SGV, len(lengths), need.causal, scale))
    if not need.causal:
        triples = zip(q_TNK.split(lengths), k_SGK.split(lengths), v_SGV.split(lengths), strict=True)
        return AttentionOut(torch.cat([_batch(q, k, v, 1, False, scale) for q, k, v in triples]))
    batches, row_T = _padded_batches(lengths, q_TNK.device)
    outputs = []
    for rows_BL in batches:
        rows = rows_BL.flatten()
        outputs.append(_batch(q_TNK[rows], k_SGK[rows], v_SGV[rows], len(rows_BL), True, scale))
    return AttentionOut(torch.cat(outputs)[row_T])


def refuse(need: AttentionNeed) -> str | None:
    """Refuse all but self-attention in half precision on an accelerator, without window and sink."""
    if reason := refuse_blocks(need):
        return reason
    if need.on_cpu:
        return "it runs on accelerators only"
    if need.window_keys is not None or need.has_sink:
        return "torch's call has neither windows nor sinks"
    if not need.is_self_attention:
        return "a sequence has more keys than queries, which torch's causal mask cannot express"
    if need.dtype not in (torch.bfloat16, torch.float16):
        return f"torch's fused kernels compute half precision, not {need.dtype}"
    if not has_fused_attention(need.num_heads, need.num_kv_heads, need.key_dim, need.value_dim, need.dtype):
        return "none of torch's fused kernels takes these heads on this accelerator"
    return None


@functools.lru_cache(maxsize=4)  # all layers of a pass use the same lengths
@torch.inference_mode(False)  # a later pass may save the cached tensors for its backward
def _padded_batches(lengths: tuple[int, ...], device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the padded batches and their inverse index.

    Returns:
        For each padded length L, the rows of the pack of its sequences, int64 [B, L]; padding repeats the first row of
        its sequence. And for each token of the pack, its row in the concatenated batches, int64 [T].
    """
    sequences_by_length: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in lengths:
        padded_length = length if length > _MAX_PADDED else 1 << max(length - 1, 0).bit_length()
        sequences_by_length.setdefault(padded_length, []).append((start, length))
        start += length
    batches, row_T, num_rows = [], torch.empty(start, dtype=torch.int64), 0
    for padded_length, sequences in sequences_by_length.items():
        starts_B1, lengths_B1 = torch.tensor(sequences).T[..., None]
        position_L = torch.arange(padded_length)
        is_real = position_L < lengths_B1
        rows_BL = starts_B1 + torch.where(is_real, position_L, 0)
        row_T[rows_BL[is_real]] = num_rows + torch.nonzero(is_real.flatten())[:, 0]
        batches.append(uploaded(rows_BL, torch.int64, device))
        num_rows += rows_BL.numel()
    return batches, uploaded(row_T, torch.int64, device)


def _batch(
    q_TNK: torch.Tensor, k_SGK: torch.Tensor, v_SGV: torch.Tensor, num_sequences: int, causal: bool, scale: float
) -> torch.Tensor:
    q, k, v = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q_TNK, k_SGK, v_SGV))
    backends = PREFERRED if q.shape[2] > _SHORT else [*PREFERRED, SDPBackend.MATH]
    try:
        with sdpa_kernel(backends, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise ConfigError(
            f"none of torch's fused kernels takes attention of {q.shape[2]:,} tokens with {q.shape[1]} query heads of "
            f"{q.shape[3]} dims, {k.shape[1]} key heads and values of {v.shape[3]} dims in {q.dtype}, and torch's "
            "unfused one would hold tokens x tokens logits of every head. Choose another backend, for example "
            "OPENMIMO_ATTENTION=blocked."
        ) from error
    return out.transpose(1, 2).flatten(0, 1)


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
