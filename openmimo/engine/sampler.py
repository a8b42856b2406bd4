"""From logits to tokens: greedy, or by one random number a token that depends on seed and position alone.

R rows (one per position to decide), V vocabulary.

The random number of a position is a hash, not the state of a generator, so it does not matter in which batch, in which
order or how often (a drafted token is judged before it is confirmed) a position is decided: it comes out the same.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from openmimo.core.records import SamplingParams, TokenLogprob

NO_TOKEN = -1
_MAX_DISTRIBUTION_NUMBERS = 1 << 21  # 16 MiB in float64, of which sorting holds several copies
_MASK_64 = (1 << 64) - 1
_UNIFORM_BITS = 52  # one fewer than float64 holds, so that u < 1 and u * total < total survive rounding


class Draw(NamedTuple):
    """One position to decide: how, with which seed, where the token will stand, and what changes its logits."""

    params: SamplingParams
    seed: int
    position: int
    change: "LogitChange | None" = None


class LogitChange(NamedTuple):
    """What a request does to the logits of one position, beside its `params`.

    prompt: the tokens of the prompt. counts: how often each token is in the text before this position. forbidden: ids
    that cannot be chosen here. allowed_V: bool mask of those that can (None: all), on any device.
    """

    prompt: frozenset[int]
    counts: Mapping[int, int]
    forbidden: frozenset[int]
    allowed_V: torch.Tensor | None


def sample(logits_RV: torch.Tensor, draws: list[Draw]) -> list[int]:
    """A token for each row: the arg max at temperature 0, else drawn from the row's filtered distribution.

    `NO_TOKEN` where the row has none to choose: it holds no finite number, or one that is not a number.
    """
    changed = [row for row, draw in enumerate(draws) if draw.change is not None]
    if changed:
        logits_RV = logits_RV.clone()
        for row in changed:
            _change(logits_RV[row], draws[row].params, draws[row].change)
    largest_R, tokens_R = logits_RV.max(dim=-1)
    sampled = [row for row, draw in enumerate(draws) if draw.params.temperature > 0.0]
    if sampled:
        rows = torch.tensor(sampled, device=logits_RV.device)
        tokens_R[rows] = _draw(logits_RV[rows], [draws[row] for row in sampled])
    return tokens_R.where(largest_R.isfinite(), NO_TOKEN).tolist()


def chosen_logprobs(logits_RV: torch.Tensor, tokens: list[int], draws: list[Draw]) -> list[TokenLogprob]:
    """Log-probability of each row's token, and the likeliest, at the sampling temperature (1 where greedy).

    This is the distribution before biases, penalties and cuts.
    """
    temperature_R1 = logits_RV.new_tensor([[draw.params.temperature or 1.0] for draw in draws])
    logprobs_RV = (logits_RV / temperature_R1).log_softmax(dim=-1)
    tokens_R1 = torch.tensor(tokens, device=logits_RV.device).clamp(min=0)[:, None]  # NO_TOKEN: its value is unused
    chosen = logprobs_RV.gather(1, tokens_R1)[:, 0].tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(draws)
    most = max(draw.params.top_logprobs for draw in draws)
    if most:
        values, ids = logprobs_RV.topk(min(most, logprobs_RV.shape[1]), dim=-1)
        pairs = zip(ids.tolist(), values.tolist(), draws, strict=True)
        tops = [tuple(zip(i, v, strict=True))[: draw.params.top_logprobs] for i, v, draw in pairs]
    return [TokenLogprob(*entry) for entry in zip(tokens, chosen, tops, strict=True)]


def _change(logits_V: torch.Tensor, params: SamplingParams, change: LogitChange) -> None:
    """Applies biases, penalties and masks in place, in the order of the fields of SamplingParams."""

    def index(ids: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(ids), device=logits_V.device, dtype=torch.int64)

    if params.logit_bias:
        logits_V[index(params.logit_bias)] += logits_V.new_tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1.0:
        seen = index(change.prompt | change.counts.keys())
        old = logits_V[seen]
        logits_V[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if change.counts and (params.presence_penalty or params.frequency_penalty):
        counts = logits_V.new_tensor(list(change.counts.values()))
        logits_V[index(change.counts)] -= params.presence_penalty + params.frequency_penalty * counts
    if change.allowed_V is not None:
        logits_V.masked_fill_(~change.allowed_V.to(logits_V.device), float("-inf"))
    if change.forbidden:
        forbidden = index(change.forbidden)
        kept = logits_V[forbidden]
        logits_V[forbidden] = float("-inf")
        if logits_V.max() == float("-inf"):  # nothing else is allowed: the structure is complete
            logits_V[forbidden] = kept


def filtered_probabilities(logits_RV: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The distribution each row is drawn from, float64 [R, V], not normalized: temperature, then the cuts.

    Top-p keeps the smallest set of most likely tokens that holds that probability, top-k at most that many of them,
    min-p those at least this fraction as likely as the likeliest.
    """
    temperature_R1 = _column([p.temperature for p in params], logits_RV)
    probabilities_RV = (logits_RV.double() / temperature_R1).softmax(dim=-1)
    if all(p.top_p == 1.0 and p.top_k == 0 and p.min_p == 0.0 for p in params):
        return probabilities_RV
    vocab_size = logits_RV.shape[1]
    # 2 stands for "no limit": a running sum may round to above 1.
    top_p_R1 = _column([p.top_p if p.top_p < 1.0 else 2.0 for p in params], logits_RV)
    top_k_R1 = _column([min(p.top_k or vocab_size, vocab_size) for p in params], logits_RV)
    sorted_RV, order_RV = probabilities_RV.sort(dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    rank_V = torch.arange(vocab_size, device=logits_RV.device)
    min_p_R1 = _column([p.min_p for p in params], logits_RV)
    kept_RV = (before_RV < top_p_R1) & (rank_V < top_k_R1) & (sorted_RV >= min_p_R1 * sorted_RV[:, :1])
    return torch.zeros_like(probabilities_RV).scatter(1, order_RV, sorted_RV * kept_RV)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for this seed and position (splitmix64, Steele et al. 2014, as a counter-based hash)."""
    return (_mix(_mix(seed & _MASK_64) ^ position) >> (64 - _UNIFORM_BITS)) / (1 << _UNIFORM_BITS)


def _draw(logits_RV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Inverts each row's cumulative distribution, in order of token id, at the position's random number.

    Some rows at a time, because the float64 distributions take many times the memory of the logits.
    """
    rows = max(_MAX_DISTRIBUTION_NUMBERS // logits_RV.shape[1], 1)
    starts = range(0, len(draws), rows)
    return torch.cat([_draw_rows(logits_RV[start : start + rows], draws[start : start + rows]) for start in starts])


def _draw_rows(logits_RV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    cumulative_RV = filtered_probabilities(logits_RV, [draw.params for draw in draws]).cumsum(dim=-1)
    uniform_R1 = _column([uniform(draw.seed, draw.position) for draw in draws], logits_RV)
    return torch.searchsorted(cumulative_RV, uniform_R1 * cumulative_RV[:, -1:], right=True)[:, 0]


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
