"""Prompts on an accelerator: one kernel for all sequences of a pass, with windows and sinks."""

import functools

import torch

from openmimo.kernels.attention import CAUSAL_ONLY, AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import refuse_blocks
from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.runtime.device import uploaded

_MAX_DIMS = 256  # of a key or a value
_MAX_HEADS = 128  # query heads of a key/value head


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

    query_lengths_B, key_lengths_B = (_uploaded(x, q_TNK.device) for x in (need.query_lengths, need.key_lengths))
    out_TNV = attend_tiles(
        q_TNK,
        k_SGK,
        v_SGV,
        None,
        sink_N,
        query_lengths_B,
        key_lengths_B,
        longest_query=max(need.query_lengths),
        scale=scale,
        window_keys=need.window_keys,
    )
    return AttentionOut(out_TNV)


@functools.lru_cache(maxsize=8)  # all layers of a pass use the same lengths
@torch.inference_mode(False)
def _uploaded(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return uploaded(lengths, torch.int32, device)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse training, block scores, chosen blocks, attention to later keys, and large heads."""
    if reason := refuse_blocks(need):
        return reason
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients:
        return "it has no backward pass"
    if not need.causal:
        return CAUSAL_ONLY
    if max(need.key_dim, need.value_dim) > _MAX_DIMS:
        return f"its heads have up to {_MAX_DIMS} dims"
    if need.num_heads // need.num_kv_heads > _MAX_HEADS:
        return f"it takes up to {_MAX_HEADS} query heads of a key/value head"
    return None


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
