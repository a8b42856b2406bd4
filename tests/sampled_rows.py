"""Rows to sample, each of a request of its own."""

from typing import NamedTuple

import torch

from openmimo.core.records import SamplingParams
from openmimo.engine.sampler import SamplingInput, SamplingTable, decide, seat_sampling, uniform


class Draw(NamedTuple):
    """One position to decide."""

    params: SamplingParams
    seed: int
    position: int


def sampling_of(draws: list[Draw]) -> tuple[SamplingInput, SamplingTable]:
    """The input for rows of which row n belongs to seat n, and the table with their parameters."""
    rows = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
    has_logprobs = any(draw.params.logprobs or draw.params.top_logprobs for draw in draws)
    sampling = SamplingInput(
        admitted=tuple(seat_sampling(seat, draw.params) for seat, draw in enumerate(draws)),
        seats_S=torch.tensor(rows) if rows else None,
        uniform_S=torch.tensor([uniform(draws[row].seed, draws[row].position) for row in rows], dtype=torch.float64),
        sampled_rows_S=torch.tensor(rows) if len(rows) < len(draws) else None,
        has_filters=any(
            draws[row].params.top_p < 1 or draws[row].params.top_k or draws[row].params.min_p for row in rows
        ),
        logprob_seats_R=torch.arange(len(draws)) if has_logprobs else None,
        num_top_logprobs=max(draw.params.top_logprobs for draw in draws),
    )
    table = SamplingTable(100, "cpu")
    table.update(sampling)
    return sampling, table


def sample(logits_RV: torch.Tensor, draws: list[Draw]) -> list[int]:
    """The token of each row."""
    return decide(logits_RV, *sampling_of(draws), torch.empty(0, dtype=torch.int64)).tolist()
