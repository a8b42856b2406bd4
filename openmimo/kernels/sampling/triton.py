"""Sampling on an accelerator: one kernel that finds the filtered set by a search for its smallest logit.

R rows, V vocabulary.
"""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import SamplingFunctions, SamplingNeed


def draw(logits_RV: torch.Tensor, numbers_5R: torch.Tensor, uniform_R: torch.Tensor, has_filters: bool) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.draw_tokens`."""
    from openmimo.kernels.sampling._triton import draw_rows

    return draw_rows(logits_RV, numbers_5R, uniform_R, has_filters=has_filters)


def logprobs(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, temperature_R: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Implement `openmimo.kernels.operations.chosen_logprobs`."""
    from openmimo.kernels.sampling._triton import log_sums

    sums_R = log_sums(logits_RV, temperature_R)
    temperature_R1 = temperature_R[:, None].float()
    chosen_R = logits_RV.gather(1, tokens_R[:, None])[:, 0] / temperature_R1[:, 0] - sums_R
    if not num_top:
        return chosen_R, None, None
    top = logits_RV.topk(min(num_top, logits_RV.shape[1]), dim=-1)
    return chosen_R, top.indices, top.values / temperature_R1 - sums_R[:, None]


def refuse(need: SamplingNeed) -> str | None:
    """Logits in float32 on an accelerator."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.dtype != torch.float32:
        return f"it reads float32 logits, not {need.dtype}"
    return None if need.readable else "the logits of a row are not contiguous"


PLUGIN = Backend(priority=80, run=SamplingFunctions(draw, logprobs), refuse=refuse)
