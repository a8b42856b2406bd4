"""Sampling: from logits to tokens, greedy or with one random number per token.

R rows (one per position to decide), V vocabulary. The host makes a `SamplingInput` from `Draw`s; `decide` runs on the
device.

The random number of a position is a hash of seed and position, not the state of a generator. So the token does not
depend on the batch, the order or the number of times that a position is decided (once as a draft, once confirmed).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from openmimo.core.records import SamplingParams

NO_TOKEN = -1
_MAX_DISTRIBUTION_NUMBERS = 1 << 21  # 16 MiB in float64; sorting needs several copies
_MASK_64 = (1 << 64) - 1
_UNIFORM_BITS = 52  # one fewer than float64 holds, so that u < 1 and u * total < total survive rounding


class Draw(NamedTuple):
    """One position to decide.

    Attributes:
        params: Sampling parameters.
        seed: Seed of the request.
        position: Position of the token to decide.
        change: Changes of the logits; None if the request has none.
    """

    params: SamplingParams
    seed: int
    position: int
    change: "LogitChange | None" = None


class LogitChange(NamedTuple):
    """The state of a request that, together with its `params`, changes the logits of one position.

    Attributes:
        prompt: Distinct tokens of the prompt.
        counts: Number of occurrences of each token in the text before this position.
        forbidden: Ids that cannot be chosen here.
        allowed_V: Bool mask of the ids that can be chosen (None: all), on any device.
    """

    prompt: frozenset[int]
    counts: Mapping[int, int]
    forbidden: frozenset[int]
    allowed_V: torch.Tensor | None


@dataclass(frozen=True)
class ChangeInput:
    """A `LogitChange` and the parameters that it needs, as tensors: ids int64, values float64.

    Attributes:
        row: The row to change.
        bias_ids: Tokens with a bias.
        biases: Their biases.
        seen_ids: Tokens of prompt and text so far, for `repetition_penalty`.
        repetition_penalty: As in `SamplingParams`.
        counted_ids: Generated tokens, for the other two penalties.
        counts: Their numbers of occurrences.
        presence_penalty: As in `SamplingParams`.
        frequency_penalty: As in `SamplingParams`.
        allowed_V: Bool mask of the tokens that may be chosen (None: all).
        forbidden_ids: Tokens that cannot be chosen, unless no other is left.
    """

    row: int
    bias_ids: torch.Tensor
    biases: torch.Tensor
    seen_ids: torch.Tensor
    repetition_penalty: float
    counted_ids: torch.Tensor
    counts: torch.Tensor
    presence_penalty: float
    frequency_penalty: float
    allowed_V: torch.Tensor | None
    forbidden_ids: torch.Tensor


@dataclass(frozen=True)
class SamplingInput:
    """The sampling of all rows of a step. S sampled rows; the others are greedy.

    Attributes:
        numbers_5S: Per sampled row, float64: temperature, top-p (2: none), top-k (infinite: none), min-p, and the
            random number of the position. None if all rows are greedy.
        sampled_rows_S: The sampled rows, int64; None: all rows.
        has_filters: Whether a row has top-p, top-k or min-p.
        changes: Changes of logits, applied first.
        logprob_temperature_R1: Temperature of the reported log-probabilities, float32; None if no request needs any.
        num_top_logprobs: The largest `top_logprobs` of a request.
    """

    numbers_5S: torch.Tensor | None
    sampled_rows_S: torch.Tensor | None
    has_filters: bool
    changes: tuple[ChangeInput, ...]
    logprob_temperature_R1: torch.Tensor | None
    num_top_logprobs: int


def sampling_input(draws: list[Draw], device: torch.device | str = "cpu") -> SamplingInput:
    """The `SamplingInput` of the positions to decide."""
    sampled = [row for row, draw in enumerate(draws) if draw.params.temperature > 0.0]
    params = [draws[row].params for row in sampled]
    numbers_5S = rows_S = None
    if sampled:
        columns = (
            [p.temperature for p in params],
            [p.top_p if p.top_p < 1.0 else 2.0 for p in params],  # the cumulative sum may round to above 1
            [p.top_k or math.inf for p in params],
            [p.min_p for p in params],
            [uniform(draws[row].seed, draws[row].position) for row in sampled],
        )
        numbers_5S = torch.tensor(columns, dtype=torch.float64, device=device)
        if len(sampled) < len(draws):
            rows_S = torch.tensor(sampled, device=device)
    changes = tuple(
        _change_input(row, draw.params, draw.change, device)
        for row, draw in enumerate(draws)
        if draw.change is not None
    )
    temperature_R1 = None
    if any(draw.params.logprobs or draw.params.top_logprobs for draw in draws):
        temperature_R1 = torch.tensor([[draw.params.temperature or 1.0] for draw in draws], device=device)
    return SamplingInput(
        numbers_5S,
        rows_S,
        any(p.top_p != 1.0 or p.top_k or p.min_p for p in params),
        changes,
        temperature_R1,
        max((draw.params.top_logprobs for draw in draws), default=0),
    )


def decide(logits_RV: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
    """Decides a token for each row, int64 [R]: the argmax at temperature 0, else a draw from the filtered distribution.

    The token is `NO_TOKEN` for a row whose maximum is not finite: all logits are -inf, or one is NaN or +inf.
    """
    if sampling.changes:
        logits_RV = logits_RV.clone()
        for change in sampling.changes:
            _change(logits_RV[change.row], change)
    largest_R, tokens_R = logits_RV.max(dim=-1)
    if sampling.numbers_5S is not None:
        rows_S = sampling.sampled_rows_S
        if rows_S is None:
            tokens_R = _draw(logits_RV, sampling)
        else:
            tokens_R[rows_S] = _draw(logits_RV[rows_S], sampling)
    return tokens_R.where(largest_R.isfinite(), NO_TOKEN)


def decided_logprobs(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, sampling: SamplingInput
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Log-probabilities of the decided tokens, and of the likeliest tokens if a request needs them.

    They are those of the distribution at the sampling temperature (1 for greedy rows), before biases, penalties and
    filters.

    Returns:
        Log-probabilities [R] of `tokens_R`; ids and log-probabilities [R, num_top_logprobs] of the likeliest tokens.
    """
    assert sampling.logprob_temperature_R1 is not None
    logprobs_RV = (logits_RV / sampling.logprob_temperature_R1.to(logits_RV.dtype)).log_softmax(dim=-1)
    chosen_R = logprobs_RV.gather(1, tokens_R.clamp(min=0)[:, None])[:, 0]  # the value of NO_TOKEN is not used
    if not sampling.num_top_logprobs:
        return chosen_R, None, None
    values, ids = logprobs_RV.topk(min(sampling.num_top_logprobs, logprobs_RV.shape[1]), dim=-1)
    return chosen_R, ids, values


def _change_input(row: int, params: SamplingParams, change: LogitChange, device: torch.device | str) -> ChangeInput:
    def ids(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), device=device, dtype=torch.int64)

    def numbers(values: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(values), device=device, dtype=torch.float64)

    is_repetition_penalized = params.repetition_penalty != 1.0
    is_counted = bool(params.presence_penalty or params.frequency_penalty)
    return ChangeInput(
        row,
        ids(params.logit_bias),
        numbers(params.logit_bias.values()),
        ids(change.prompt | change.counts.keys() if is_repetition_penalized else ()),
        params.repetition_penalty,
        ids(change.counts if is_counted else ()),
        numbers(change.counts.values() if is_counted else ()),
        params.presence_penalty,
        params.frequency_penalty,
        None if change.allowed_V is None else change.allowed_V.to(device),
        ids(change.forbidden),
    )


def _change(logits_V: torch.Tensor, change: ChangeInput) -> None:
    """Applies biases, penalties and masks in place, in the order of the fields of SamplingParams."""
    if len(change.bias_ids):
        logits_V[change.bias_ids] += change.biases.to(logits_V.dtype)
    if len(change.seen_ids):
        old, penalty = logits_V[change.seen_ids], change.repetition_penalty
        logits_V[change.seen_ids] = torch.where(old > 0, old / penalty, old * penalty)
    if len(change.counted_ids):
        counts = change.counts.to(logits_V.dtype)
        logits_V[change.counted_ids] -= change.presence_penalty + change.frequency_penalty * counts
    if change.allowed_V is not None:
        logits_V.masked_fill_(~change.allowed_V, float("-inf"))
    if len(change.forbidden_ids):
        kept = logits_V[change.forbidden_ids]
        logits_V[change.forbidden_ids] = float("-inf")
        # If no other token is allowed, the structure is complete and the text may end.
        is_open = logits_V.max() > float("-inf")
        logits_V[change.forbidden_ids] = logits_V[change.forbidden_ids].where(is_open, kept)


def filtered_probabilities(logits_RV: torch.Tensor, numbers_5R: torch.Tensor, *, has_filters: bool) -> torch.Tensor:
    """The distribution of each row after temperature and filters, float64 [R, V], not normalized.

    Top-p keeps the smallest set of the most likely tokens that holds that probability, top-k at most that many tokens,
    and min-p the tokens at least that fraction as likely as the likeliest. `numbers_5R` is as in `SamplingInput`.
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


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for this seed and position (splitmix64, Steele et al. 2014, as a counter-based hash)."""
    return (_mix(_mix(seed & _MASK_64) ^ position) >> (64 - _UNIFORM_BITS)) / (1 << _UNIFORM_BITS)


def _draw(logits_RV: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
    """Draws by inverting each row's cumulative distribution, in order of token id, at the random number.

    Large batches are split by rows, because the float64 distributions need many times the memory of the logits.
    """
    assert sampling.numbers_5S is not None
    rows = max(_MAX_DISTRIBUTION_NUMBERS // logits_RV.shape[1], 1)
    if len(logits_RV) <= rows:
        return _draw_rows(logits_RV, sampling.numbers_5S, sampling.has_filters)
    pieces = zip(logits_RV.split(rows), sampling.numbers_5S.split(rows, dim=1), strict=True)
    return torch.cat([_draw_rows(logits, numbers, sampling.has_filters) for logits, numbers in pieces])


def _draw_rows(logits_RV: torch.Tensor, numbers_5R: torch.Tensor, has_filters: bool) -> torch.Tensor:
    cumulative_RV = filtered_probabilities(logits_RV, numbers_5R, has_filters=has_filters).cumsum(dim=-1)
    uniform_R1 = numbers_5R[4, :, None]
    return torch.searchsorted(cumulative_RV, uniform_R1 * cumulative_RV[:, -1:], right=True)[:, 0]


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
