"""Bfloat16 on a CPU without bfloat16 instructions: the same call in float32, by the best backend for float32."""

from dataclasses import replace

import torch

from openmimo.kernels.attention import ATTENTION, AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import refuse_blocks
from openmimo.kernels.dispatch import Backend
from openmimo.runtime.device import cpu_multiplies_bfloat16


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
    _, backend = ATTENTION.best(replace(need, dtype=torch.float32))
    sink_N = None if sink_N is None else sink_N.float()
    wide = backend.run(
        q_TNK.float(), k_SGK.float(), v_SGV.float(), sink_N, need=replace(need, dtype=torch.float32), scale=scale
    )
    return AttentionOut(wide.out_TNV.to(q_TNK.dtype))


def refuse(need: AttentionNeed) -> str | None:
    """Refuse all but bfloat16 on a CPU without instructions for it."""
    if reason := refuse_blocks(need):
        return reason
    if not need.on_cpu:
        return "it runs on CPUs only"
    if need.dtype != torch.bfloat16:
        return f"it computes bfloat16 only, not {need.dtype}"
    if cpu_multiplies_bfloat16():
        return "this CPU multiplies bfloat16 itself"
    return None


PLUGIN = Backend(priority=70, run=run, refuse=refuse)
