"""Sampling: from logits to tokens, greedy or with one random number per token.

R rows (one per position to decide), X seats, V vocabulary. The host makes a `SamplingInput`; `decide` runs on the
device, where a `SamplingTable` keeps the parameters of each request.

The random number of a position is a hash of seed and position, not the state of a generator. So the token does not
depend on the batch, the order or the number of times that a position is decided (once as a draft, once confirmed).
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from openmimo.core.records import SamplingParams
from openmimo.kernels.operations import (
    MIX_ADDEND,
    MIX_LAST_SHIFT,
    MIX_ROUNDS,
    UNIFORM_BITS,
    chosen_logprobs,
    draw_tokens,
    signed,
)
from openmimo.runtime.device import uploaded

NO_TOKEN = -1
_MASK_64 = (1 << 64) - 1
_NUMBERS, _FIRST_SEATS = 5, 64


class SeatChange(NamedTuple):
    """What changes the logits of a request, as tensors: ids int64, values float64.

    Attributes:
        bias_ids: Tokens with a bias.
        biases: Their biases.
        stop_ids: Tokens that cannot be chosen before `SamplingParams.min_tokens`, unless no other is left.
        prompt_ids: The distinct tokens of the prompt, for `repetition_penalty`; else none.
        repetition_penalty: As in `SamplingParams`.
        presence_penalty: As in `SamplingParams`.
        frequency_penalty: As in `SamplingParams`.
    """

    bias_ids: torch.Tensor
    biases: torch.Tensor
    stop_ids: torch.Tensor
    prompt_ids: torch.Tensor
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


class SeatSampling(NamedTuple):
    """The sampling parameters of one request. A worker keeps them for the seat until it gets others.

    Attributes:
        seat: The seat of the request.
        numbers: Temperature, top-p (2: none), top-k (infinite: none), min-p, and the temperature of the reported
            log-probabilities (1 for greedy requests).
        change: Changes of the logits; None if there are none.
    """

    seat: int
    numbers: tuple[float, float, float, float, float]
    change: SeatChange | None


class RowChange(NamedTuple):
    """The change of the logits of one row.

    Attributes:
        row: The row to change.
        seat: The seat of its request.
        num_drafts: Drafts before the row that belong to the text, as far as the row is concerned: the tokens of the
            pass in this row and the ones before it.
        forbids_stops: Whether the text is too short to end.
        allowed_bits: The tokens that may be chosen (None: all), uint8: token t is bit t % 8 of byte t // 8.
    """

    row: int
    seat: int
    num_drafts: int = 0
    forbids_stops: bool = False
    allowed_bits: np.ndarray | None = None


class SamplingInput(NamedTuple):
    """The sampling of all rows of a step. S sampled rows; the others are greedy.

    Attributes:
        admitted: Parameters that the worker writes first.
        new_tokens: For seats with penalties, the tokens that their texts gained since the last step.
        seats_S: The seats of the sampled rows, int64; None if all rows are greedy.
        uniform_S: The random numbers of their positions, float64.
        sampled_rows_S: The sampled rows, int64; None: all rows.
        has_filters: Whether a row has top-p, top-k or min-p.
        changes: Changes of logits, applied first.
        logprob_seats_R: The seats of all rows, int64, for the temperature of log-probabilities; None if no request
            needs any.
        num_top_logprobs: The largest `top_logprobs` of a request.
    """

    admitted: tuple[SeatSampling, ...] = ()
    new_tokens: tuple[tuple[int, list[int]], ...] = ()
    seats_S: torch.Tensor | None = None
    uniform_S: torch.Tensor | None = None
    sampled_rows_S: torch.Tensor | None = None
    has_filters: bool = False
    changes: tuple[RowChange, ...] = ()
    logprob_seats_R: torch.Tensor | None = None
    num_top_logprobs: int = 0


def seat_sampling(
    seat: int,
    params: SamplingParams,
    *,
    prompt: Iterable[int] = (),
    stop_ids: Iterable[int] = (),
    device: torch.device | str = "cpu",
) -> SeatSampling:
    """The parameters of a request as a worker keeps them."""

    def ids(values: Iterable[int]) -> torch.Tensor:
        return uploaded(list(values), torch.int64, device)

    top_p = params.top_p if params.top_p < 1.0 else 2.0  # the cumulative sum may round to above 1
    temperature = params.temperature
    numbers = (temperature, top_p, params.top_k or math.inf, params.min_p, temperature or 1.0)
    if not params.changes_logits:
        return SeatSampling(seat, numbers, None)
    change = SeatChange(
        bias_ids=ids(params.logit_bias),
        biases=uploaded(list(params.logit_bias.values()), torch.float64, device),
        stop_ids=ids(stop_ids if params.min_tokens else ()),
        prompt_ids=ids(set(prompt) if params.repetition_penalty != 1.0 else ()),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )
    return SeatSampling(seat, numbers, change)


class _TokenCounts:
    """The tokens of the texts of seats with penalties. Each such seat has a place, P of them.

    Args:
        vocab_size: Of the model.
        device: Of the tensors.
    """

    def __init__(self, vocab_size: int, device: torch.device | str):
        self._vocab_size = vocab_size
        self._counts_PV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt_PV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._place_of_seat: dict[int, int] = {}
        self._free_places: list[int] = []

    def __contains__(self, seat: int) -> bool:
        return seat in self._place_of_seat

    def start(self, seat: int, prompt_ids: torch.Tensor) -> None:
        """Gives a seat a place without counts, and the distinct tokens of its prompt."""
        if not self._free_places:
            num_places = len(self._counts_PV)
            self._free_places += range(num_places, 2 * num_places + 1)
            self._counts_PV, self._in_prompt_PV = (
                torch.cat([tensor, tensor.new_zeros(num_places + 1, self._vocab_size)])
                for tensor in (self._counts_PV, self._in_prompt_PV)
            )
        place = self._place_of_seat[seat] = self._free_places.pop()
        self._counts_PV[place] = 0
        self._in_prompt_PV[place] = False
        self._in_prompt_PV[place].index_fill_(0, prompt_ids, True)  # an assignment would wait for the device

    def end(self, seat: int) -> None:
        """Frees the place of a seat, if it has one."""
        place = self._place_of_seat.pop(seat, None)
        if place is not None:
            self._free_places.append(place)

    def add(self, new_tokens: Iterable[tuple[int, list[int]]]) -> None:
        """Counts tokens of the texts of seats."""
        entries = [self._place_of_seat[seat] * self._vocab_size + token for seat, ids in new_tokens for token in ids]
        if entries:
            entries_N = uploaded(entries, torch.int64, self._counts_PV.device)
            self._counts_PV.view(-1).index_add_(0, entries_N, torch.ones_like(entries_N, dtype=torch.int32))

    def of(self, seats: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the counts, int32, and of whether the prompt has a token, bool, for each seat, [M, V] both."""
        places_M = uploaded([self._place_of_seat[seat] for seat in seats], torch.int64, self._counts_PV.device)
        return self._counts_PV[places_M], self._in_prompt_PV[places_M]


class SamplingTable:
    """The sampling parameters of all seats on the device. They are written when a request is admitted.

    Args:
        vocab_size: Of the model.
        device: Of the tensors.
    """

    def __init__(self, vocab_size: int, device: torch.device | str):
        self._numbers_5X = torch.zeros(_NUMBERS, _FIRST_SEATS, dtype=torch.float64, device=device)
        self._changes: dict[int, SeatChange] = {}
        self._counts = _TokenCounts(vocab_size, device)

    def reserve(self, num_seats: int) -> None:
        """Makes room for this many seats. The numbers of a seat without a request are zero."""
        if num_seats > self._numbers_5X.shape[1]:
            grown_5X = self._numbers_5X.new_zeros(_NUMBERS, 2 * num_seats)
            grown_5X[:, : self._numbers_5X.shape[1]] = self._numbers_5X
            self._numbers_5X = grown_5X

    def update(self, sampling: SamplingInput) -> None:
        """Writes the parameters of admitted requests, and counts the tokens that texts with penalties gained."""
        for admitted in sampling.admitted:
            self._admit(admitted)
        self._counts.add(sampling.new_tokens)

    @property
    def address(self) -> int:
        """Where the numbers are. It changes when they grow."""
        return self._numbers_5X.data_ptr()

    def numbers(self, seats_S: torch.Tensor) -> torch.Tensor:
        """The numbers of `SeatSampling`, float64 [5, S]."""
        return self._numbers_5X.index_select(1, seats_S)

    def change(self, logits_RV: torch.Tensor, changes: Sequence[RowChange], token_ids_T: torch.Tensor) -> None:
        """Applies masks, biases and penalties in place, in this order, then forbids stops.

        Each of them is a fixed number of launches for all rows.

        Args:
            logits_RV: Logits.
            changes: The changes of rows.
            token_ids_T: As in `decide`.
        """
        _mask(logits_RV, [(change.row, change.allowed_bits) for change in changes if change.allowed_bits is not None])
        self._add_biases(logits_RV, [row for row in changes if len(self._changes[row.seat].bias_ids)])
        self._penalize(logits_RV, [row for row in changes if row.seat in self._counts], token_ids_T)
        short = [row for row in changes if row.forbids_stops and len(self._changes[row.seat].stop_ids)]
        self._forbid_stops(logits_RV, short)

    def _add_biases(self, logits_RV: torch.Tensor, rows: list[RowChange]) -> None:
        if not rows:
            return
        changes = [self._changes[row.seat] for row in rows]
        rows_N = _repeated([row.row for row in rows], [len(change.bias_ids) for change in changes], logits_RV.device)
        ids_N = torch.cat([change.bias_ids for change in changes])
        logits_RV[rows_N, ids_N] += torch.cat([change.biases for change in changes]).to(logits_RV.dtype)

    def _penalize(self, logits_RV: torch.Tensor, rows: list[RowChange], token_ids_T: torch.Tensor) -> None:
        if not rows:
            return
        counts_MV, in_prompt_MV = self._counts.of([row.seat for row in rows])
        places = [place for row in rows for place in range(row.row + 1 - row.num_drafts, row.row + 1)]
        if places:  # tokens that follow the counted text
            drafts_N = token_ids_T[uploaded(places, torch.int64, logits_RV.device)]
            starts_M = [index * counts_MV.shape[1] for index in range(len(rows))]
            starts_N = _repeated(starts_M, [row.num_drafts for row in rows], logits_RV.device)
            counts_MV.view(-1).index_add_(0, starts_N + drafts_N, torch.ones_like(drafts_N, dtype=torch.int32))
        changes = [self._changes[row.seat] for row in rows]
        numbers = [(one.repetition_penalty, one.presence_penalty, one.frequency_penalty) for one in changes]
        numbers_M3 = uploaded(np.array(numbers), torch.float64, logits_RV.device).to(logits_RV.dtype)
        repetition_M1, presence_M1, frequency_M1 = numbers_M3.split(1, dim=1)
        rows_M = uploaded([row.row for row in rows], torch.int64, logits_RV.device)
        logits_MV = logits_RV[rows_M]
        is_new_MV = counts_MV > 0
        if any(change.repetition_penalty != 1.0 for change in changes):
            changed_MV = torch.where(logits_MV > 0, logits_MV / repetition_M1, logits_MV * repetition_M1)
            logits_MV = changed_MV.where(in_prompt_MV | is_new_MV, logits_MV)
        if any(change.presence_penalty or change.frequency_penalty for change in changes):
            penalty_MV = presence_M1 + frequency_M1 * counts_MV.to(logits_RV.dtype)
            logits_MV = logits_MV - penalty_MV.masked_fill_(~is_new_MV, 0.0)
        logits_RV[rows_M] = logits_MV

    def _forbid_stops(self, logits_RV: torch.Tensor, rows: list[RowChange]) -> None:
        """If no other token is allowed, the structure is complete and the text may end."""
        if not rows:
            return
        device, stops = logits_RV.device, [self._changes[row.seat].stop_ids for row in rows]
        lengths, ids_N = [len(ids) for ids in stops], torch.cat(stops)
        rows_N = _repeated([row.row for row in rows], lengths, device)
        kept_N = logits_RV[rows_N, ids_N]
        logits_RV.index_put_((rows_N, ids_N), torch.full_like(kept_N, float("-inf")))
        is_open_M = logits_RV[uploaded([row.row for row in rows], torch.int64, device)].amax(dim=1) > float("-inf")
        is_open_N = is_open_M[_repeated(range(len(rows)), lengths, device)]
        logits_RV[rows_N, ids_N] = kept_N.masked_fill_(is_open_N, float("-inf"))

    def _admit(self, admitted: SeatSampling) -> None:
        seat, change = admitted.seat, admitted.change
        device = self._numbers_5X.device
        self.reserve(seat + 1)
        self._numbers_5X[:, seat] = uploaded(admitted.numbers, torch.float64, device)
        self._changes.pop(seat, None)
        self._counts.end(seat)
        if change is None:
            return
        self._changes[seat] = change
        if change.repetition_penalty != 1.0 or change.presence_penalty or change.frequency_penalty:
            self._counts.start(seat, change.prompt_ids)


def is_allowed(allowed_bits: np.ndarray, token: int) -> bool:
    """Whether `RowChange.allowed_bits` holds a token."""
    return bool(allowed_bits[token >> 3] >> (token & 7) & 1)


def _mask(logits_RV: torch.Tensor, masks: list[tuple[int, np.ndarray]]) -> None:
    """Forbids tokens of rows in place. Biases and penalties leave them forbidden. An accelerator gets bits, at once."""
    vocab_size, device = logits_RV.shape[1], logits_RV.device
    if logits_RV.is_cpu or not masks:
        for row, bits in masks:
            is_forbidden_V = torch.from_numpy(np.unpackbits(bits, count=vocab_size, bitorder="little") == 0)
            logits_RV[row].masked_fill_(is_forbidden_V, float("-inf"))
        return
    bits_MB = uploaded(np.stack([bits for _, bits in masks]), torch.uint8, device)
    rows_M = uploaded([row for row, _ in masks], torch.int64, device)
    places_8 = torch.arange(8, dtype=torch.uint8, device=device)
    is_allowed_MV = ((bits_MB[:, :, None] >> places_8) & 1).flatten(1)[:, :vocab_size].bool()
    logits_RV[rows_M] = logits_RV[rows_M].masked_fill_(~is_allowed_MV, float("-inf"))


def _repeated(values: Sequence[int], counts: list[int], device: torch.device) -> torch.Tensor:
    """Each value as often as its count says, int64, on the device."""
    return uploaded(np.repeat(np.asarray(values), counts), torch.int64, device)


def likeliest(logits_RV: torch.Tensor) -> torch.Tensor:
    """The argmax of each row, int64 [R]; `NO_TOKEN` for a row whose maximum is not finite.

    The maximum is not finite if all logits are -inf, or one is NaN or +inf.
    """
    largest_R, tokens_R = logits_RV.max(dim=-1)
    return tokens_R.masked_fill_(largest_R - largest_R != 0, NO_TOKEN)  # true of NaN and of infinite numbers only


def decide(
    logits_RV: torch.Tensor,
    sampling: SamplingInput,
    table: SamplingTable,
    token_ids_T: torch.Tensor,
    likeliest_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decides a token for each row, int64 [R]: the argmax at temperature 0, else a draw from the filtered distribution.

    The token is `NO_TOKEN` where `likeliest` of the changed logits gives it.

    Args:
        table: Updated with `sampling`.
        token_ids_T: The tokens of the pass. Where rows follow drafts, row r is the one after token r.
        likeliest_R: `likeliest` of the logits, if it is known.
    """
    if sampling.changes:
        logits_RV = logits_RV.clone()
        table.change(logits_RV, sampling.changes, token_ids_T)
    if likeliest_R is None or sampling.changes:
        likeliest_R = likeliest(logits_RV)
    if sampling.seats_S is None:
        return likeliest_R
    assert sampling.uniform_S is not None
    numbers_5S = table.numbers(sampling.seats_S)
    rows_S = sampling.sampled_rows_S
    if rows_S is None:
        drawn_R = draw_tokens(logits_RV, numbers_5S, sampling.uniform_S, has_filters=sampling.has_filters)
    else:
        drawn_S = draw_tokens(logits_RV[rows_S], numbers_5S, sampling.uniform_S, has_filters=sampling.has_filters)
        drawn_R = likeliest_R.index_copy(0, rows_S, drawn_S)
    return drawn_R.masked_fill_(likeliest_R == NO_TOKEN, NO_TOKEN)


def decided_logprobs(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, sampling: SamplingInput, table: SamplingTable
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Log-probabilities of the decided tokens, and of the likeliest tokens if a request needs them.

    They are those of the distribution at the sampling temperature (1 for greedy rows), before biases, penalties and
    filters.

    Returns:
        Log-probabilities [R] of `tokens_R` (of no use for `NO_TOKEN`); ids and log-probabilities
        [R, num_top_logprobs] of the likeliest tokens.
    """
    assert sampling.logprob_seats_R is not None
    temperature_R = table.numbers(sampling.logprob_seats_R)[4]
    return chosen_logprobs(logits_RV, tokens_R.clamp(min=0), temperature_R, sampling.num_top_logprobs)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for this seed and position (splitmix64, Steele et al. 2014, as a counter-based hash)."""
    return (_mix(_mix(seed & _MASK_64) ^ position) >> (64 - UNIFORM_BITS)) / (1 << UNIFORM_BITS)


def seed_key(seed: int) -> int:
    """The key with which a device computes `uniform` (`DraftingSizes`), as a signed number of 64 bits."""
    return signed(_mix(seed & _MASK_64))


def _mix(value: int) -> int:
    value = (value + MIX_ADDEND) & _MASK_64
    for shift, factor in MIX_ROUNDS:
        value = ((value ^ (value >> shift)) * factor) & _MASK_64
    return value ^ (value >> MIX_LAST_SHIFT)
