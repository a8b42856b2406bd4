"""The definition: a sort of the vocabulary in float64, and the inverse of the cumulative distribution.

R rows, V vocabulary.
"""

import torch

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import SamplingFunctions

_MAX_DISTRIBUTION_NUMBERS = 1 << 21  # 16 MiB in float64; sorting needs several copies


def draw(logits_RV: torch.Tensor, numbers_5R: torch.Tensor, uniform_R: torch.Tensor, has_filters: bool) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.draw_tokens`.

    Large batches are split by rows, because the float64 distributions need many times the memory of the logits.
    """
    rows = max(_MAX_DISTRIBUTION_NUMBERS // logits_RV.shape[1], 1)
    if len(logits_RV) <= rows:
        return _draw_rows(logits_RV, numbers_5R, uniform_R, has_filters)
    pieces = zip(logits_RV.split(rows), numbers_5R.split(rows, dim=1), uniform_R.split(rows), strict=True)
    return torch.cat([_draw_rows(*piece, has_filters) for piece in pieces])


def _draw_rows(
    logits_RV: torch.Tensor, numbers_5R: torch.Tensor, uniform_R: torch.Tensor, has_filters: bool
) -> torch.Tensor:
    cumulative_RV = filtered_probabilities(logits_RV, numbers_5R, has_filters=has_filters).cumsum(dim=-1)
    return torch.searchsorted(cumulative_RV, uniform_R[:, None] * cumulative_RV[:, -1:], right=True)[:, 0]


def filtered_probabilities(logits_RV: torch.Tensor, numbers_5R: torch.Tensor, *, has_filters: bool) -> torch.Tensor:
    """Return the distribution of each row after temperature and filters, float64 [R, V], not normalized.

    Top-p keeps the smallest set of the most likely tokens that holds that probability, top-k at most that many tokens,
    and min-p the tokens at least that fraction as likely as the likeliest. `numbers_5R` is as in `SeatSampling`.
    """
    temperature_R1, top_p_R1, top_k_R1, min_p_R1, _ = numbers_5R[:, :, None]
    probabilities_RV = (logits_RV.double() / temperature_R1).softmax(dim=-1)
    if not has_filters:
        return probabilities_RV
    sorted_RV, order_RV = probabilities_RV.sort(dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    rank_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    kept_RV = (before_RV < top_p_R1) & (rank_V < top_k_R1) & (sorted_RV >= min_p_R1 * sorted_RV[:, :1])
    return torch.zeros_like(probabilities_RV).scatter(1, order_RV, sorted_RV * kept_RV)


def logprobs(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, temperature_R: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Implement `openmimo.kernels.operations.chosen_logprobs`."""
    temperature_R1 = temperature_R[:, None].float().to(logits_RV.dtype)
    logprobs_RV = (logits_RV / temperature_R1).log_softmax(dim=-1)
    chosen_R = logprobs_RV.gather(1, tokens_R[:, None])[:, 0]
    if not num_top:
        return chosen_R, None, None
    values, ids = logprobs_RV.topk(min(num_top, logprobs_RV.shape[1]), dim=-1)
    return chosen_R, ids, values


PLUGIN = Backend(priority=0, run=SamplingFunctions(draw, logprobs), refuse=lambda need: None)
