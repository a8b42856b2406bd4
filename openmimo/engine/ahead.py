"""Steps with drafts that are planned before the host knows the lengths of the texts.

The host queues step n + 1 while the device computes step n. How many drafts step n accepts is not known then. So the
worker keeps a row of integers for each seat, from which a step derives its tokens, positions, lengths and slots:

    length | first kept state | key of its random numbers | positions of each head | ring of the newest tokens

The host gives what it decides: the seats, the most drafts of each sequence, and page tables for the longest that a text
may be by then. It writes a row when a sequence takes part for the first time, and knows a row again once it has read
all steps with it. A step does what `Runner.decode` plans for known lengths: the heads bring their keys up to date and
draft, the main layers verify, a token is decided after each row, and the first wrong draft ends the text:

    rows of step n           length 6, limits 3: tokens 5, d6, d7, d8 at positions 5 to 8
    decided                  t6 = d6, t7 = d7, t8 is not d8: two drafts are accepted
    row after step n         length 9
    rows of step n + 1       tokens 8, d9, d10, d11 at positions 8 to 11; the keys at 8 are written again

All of it is one captured graph, which writes no row itself, because a capture runs its work three times. New rows are
written after it. A graph has padded passes: packed rows of the sequences and then rows that belong to none and have no
page. A CPU has no graphs; it reads the lengths and runs passes of the exact sizes. Only tests do that.

B sequences, T rows of a pass, H heads that draft, L = H + 1, M numbers of a row, R places of a ring, p parts of a group
of layers, Y rows of a page table, X seats, D model dim, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch

from openmimo.engine.cache import PageArena
from openmimo.engine.request_state import RequestState
from openmimo.engine.sampler import (
    NO_TOKEN,
    SamplingInput,
    SamplingTable,
    SeatSampling,
    decided_logprobs,
    likeliest,
    random_numbers,
    seed_key,
)
from openmimo.engine.step import (
    AdmittedRows,
    AheadInput,
    AheadOutput,
    GroupSlots,
    PassInput,
    PassShape,
    StepBuffers,
    ahead_shapes,
)
from openmimo.engine.worker import Worker
from openmimo.kernels.operations import draw_tokens
from openmimo.model.backbone import Hidden
from openmimo.runtime.device import uploaded

_LENGTH, _STATES_START, _KEY, _HEADS = range(4)  # columns of a row; those of the heads and the ring follow


class AheadPlanner:
    """The host side: makes an `AheadInput` from sequences.

    Args:
        buffers: Buffers of decoding steps over all layers.
        num_drafts: Heads that may draft.
        ring_positions: As in `Worker`.
        max_sequences: Limit of the engine.
        max_positions: Limit of the model.
    """

    def __init__(
        self, buffers: StepBuffers, *, num_drafts: int, ring_positions: int, max_sequences: int, max_positions: int
    ):
        self._buffers = buffers
        self._num_drafts, self._ring_positions = num_drafts, ring_positions
        self._max_sequences, self._max_positions = max_sequences, max_positions

    def plan(
        self, sequences: list[RequestState], limits: list[int], *, spare_seat: int, admitted: tuple[SeatSampling, ...]
    ) -> AheadInput:
        """A step over these sequences.

        Args:
            sequences: The sequences. They have pages for `limits` drafts after the longest that they may be.
            limits: The most drafts of each.
            spare_seat: The seat of padding.
            admitted: Sampling parameters that the worker does not know yet.
        """
        num_heads = max(limits)
        longest_key = max(
            sequence.num_computed_tokens + sequence.num_possible_tokens + 1 + limit
            for sequence, limit in zip(sequences, limits, strict=True)
        )
        shapes = ahead_shapes(
            limits,
            num_heads,
            longest_key,
            num_drafts=self._num_drafts,
            max_sequences=self._max_sequences,
            max_positions=self._max_positions,
        )
        pages = [sequence.held_pages for sequence in sequences]
        num_surplus = shapes.main.num_sequences - len(sequences)
        values = self._buffers.values
        step = AheadInput(
            seats_B=values("seats", [each.seat for each in pages] + [spare_seat] * num_surplus),
            limits_B=values("limits", limits + [-1] * num_surplus),
            max_lengths_B=values("max_lengths", [sequence.max_length for sequence in sequences] + [1] * num_surplus),
            whole_from_B=values("whole_from", [each.whole_from for each in pages] + [0] * num_surplus),
            tables=self._buffers.fill_tables(pages, shapes.main),
            main_shape=shapes.main,
            head_shape=shapes.heads,
            num_heads=num_heads,
            is_captured=shapes.is_captured,
            draws=any(sequence.params.temperature > 0.0 for sequence in sequences),
            has_filters=any(s.params.temperature > 0.0 and s.params.has_filters for s in sequences),
            returns_logprobs=any(s.params.logprobs or s.params.top_logprobs for s in sequences),
            num_top_logprobs=max(sequence.params.top_logprobs for sequence in sequences),
            admitted=self._admitted(sequences),
            sampling=SamplingInput(admitted=admitted),
        )
        self._buffers.send()
        return step

    def follow(self, sequence: RequestState, num_heads: int, num_offered: int) -> None:
        """Updates what the host knows of the heads of a sequence, when it reads a step that has not been counted."""
        drafted_from = sequence.num_computed_tokens - sequence.num_pending_tokens
        for head in range(min(num_heads, num_offered)):
            sequence.head_lengths[head] = max(drafted_from - head, 0)
        sequence.states_start = max(sequence.states_start, drafted_from - self._num_drafts)

    def _admitted(self, sequences: list[RequestState]) -> AdmittedRows | None:
        new = [sequence for sequence in sequences if sequence.followed_pages is not sequence.pages]
        if not new:
            return None
        for sequence in new:
            sequence.followed_pages = sequence.pages
        device = self._buffers.device
        return AdmittedRows(
            uploaded([sequence.held_pages.seat for sequence in new], torch.int64, device),
            uploaded(np.array([self._row(sequence) for sequence in new]), torch.int64, device),
        )

    def _row(self, sequence: RequestState) -> list[int]:
        assert sequence.num_pending_tokens <= 1 and not sequence.num_possible_tokens, "its length is not known"
        length, ring = len(sequence.tokens) + sequence.num_pending_tokens, [0] * self._ring_positions
        for position in range(max(length - self._ring_positions, 0), len(sequence.tokens)):
            ring[position % self._ring_positions] = sequence.tokens[position]
        if sequence.num_pending_tokens:
            ring[(length - 1) % self._ring_positions] = -1 - sequence.decided_place
        return [length, sequence.states_start, seed_key(sequence.seed), *sequence.head_lengths, *ring]


class _Rows(NamedTuple):
    """The rows of a pass: those of each sequence in order, then surplus rows.

    Attributes:
        counts_B: Rows of each sequence.
        first_B: The first row of each.
        sequence_T: The sequence of each row; any for surplus rows.
        position_T: The position of each row; 0 for surplus rows.
        is_row_T: False for surplus rows.
    """

    counts_B: torch.Tensor
    first_B: torch.Tensor
    sequence_T: torch.Tensor
    position_T: torch.Tensor
    is_row_T: torch.Tensor


class _Verified(NamedTuple):
    """The results of the part of a step that is captured.

    Attributes:
        rows_BM: The rows of the sequences after the step.
        results_BX: As in `AheadOutput`.
        logits_TV: Logits of the main pass.
        tokens_T: Decided tokens.
        places_BL: The row of the main pass of each decided token of a sequence.
        seat_T: The seat of each row.
    """

    rows_BM: torch.Tensor
    results_BX: torch.Tensor
    logits_TV: torch.Tensor
    tokens_T: torch.Tensor
    places_BL: torch.Tensor
    seat_T: torch.Tensor


class AheadWorker:
    """The device side. It shares the cache, the states and the sampling parameters of a `Worker`.

    Args:
        worker: The worker.
        arena: Its cache.
        num_drafts: Heads that may draft.
    """

    def __init__(self, worker: Worker, arena: PageArena, *, num_drafts: int):
        self._worker, self._arena = worker, arena
        self._model, self._device = worker.model, worker.model.device
        self._num_drafts, self._ring_positions = num_drafts, worker.ring_positions
        self._first_token = _HEADS + num_drafts
        self._rows_XM = torch.zeros(1, self._first_token + self._ring_positions, dtype=torch.int64, device=self._device)
        self._is_exact = self._device.type == "cpu"
        self._captured_from: tuple[int, ...] = ()

    def reserve(self) -> int:
        """Makes room for the rows and states of all seats and one more. Returns the last seat, which no text has."""
        num_seats = len(self._worker.states_memory(self._arena.num_seats + 1)) // self._ring_positions
        if len(self._rows_XM) < num_seats:
            grown_XM = self._rows_XM.new_zeros(num_seats, self._rows_XM.shape[1])
            grown_XM[: len(self._rows_XM)] = self._rows_XM
            self._rows_XM = grown_XM
        return num_seats - 1

    @torch.inference_mode()
    def execute(self, step: AheadInput) -> AheadOutput:
        """Drafts, verifies, decides, and advances the rows of the sequences."""
        table = self._worker.sampling
        table.update(step.sampling)
        if step.admitted is not None:
            rows_AM = step.admitted.rows_AM
            tokens_AR = self._worker.with_decided(rows_AM[:, self._first_token :])
            rows_AM = torch.cat([rows_AM[:, : self._first_token], tokens_AR], dim=1)
            self._rows_XM.index_copy_(0, step.admitted.seats_A, rows_AM)
        done = self._replayed(step) if step.is_captured and self._worker.graphs is not None else self._verify(step)
        self._rows_XM.index_copy_(0, step.seats_B, done.rows_BM)
        if not step.returns_logprobs:
            return AheadOutput(done.results_BX)
        return _with_logprobs(step, done, table)

    def _replayed(self, step: AheadInput) -> _Verified:
        graphs = self._worker.graphs
        assert graphs is not None
        states_XD = self._worker.states_memory(0)
        memory = (self._rows_XM.data_ptr(), states_XD.data_ptr(), self._worker.sampling.address)
        if memory != self._captured_from:  # a graph reads from the addresses of its capture
            graphs.forget_ahead()
            self._captured_from = memory
        key = (step.main_shape, step.head_shape, step.draws, step.has_filters)
        return graphs.replay_ahead(key, lambda: self._verify(step))

    def _verify(self, step: AheadInput) -> _Verified:
        """A step, without writing the rows of the sequences. Doing it twice changes nothing."""
        rows_BM = self._rows_XM.index_select(0, step.seats_B)
        length_B = rows_BM[:, _LENGTH]
        starts_BH = torch.maximum(
            rows_BM[:, _HEADS : _HEADS + step.num_heads], rows_BM[:, _STATES_START : _STATES_START + 1]
        )
        offered_B = torch.minimum(step.limits_B, (step.max_lengths_B - 1 - length_B).clamp_(min=0))
        if step.num_heads:
            can_draft_B = starts_BH[:, 0] < length_B - 1
            offered_B = torch.where(can_draft_B, offered_B, offered_B.clamp(max=0))
        heads_H = torch.arange(step.num_heads, device=self._device)
        drafts_BH = heads_H < offered_B[:, None]
        drafts_HB = self._draft(step, rows_BM, starts_BH, drafts_BH)
        rows = _packed(offered_B + 1, length_B - 1, step.main_shape.num_tokens)
        places_BL = rows.first_B[:, None] + torch.arange(step.num_heads + 1, device=self._device)
        logits_TV, tokens_T = self._decide(step, rows_BM, rows, drafts_HB)
        places_BL = places_BL.clamp_(max=len(tokens_T) - 1)
        decided_BL = tokens_T[places_BL]
        is_right_BH = (decided_BL[:, : step.num_heads] == drafts_HB.T) & drafts_BH
        accepted_B = is_right_BH.cumprod(dim=1).sum(dim=1)
        return _Verified(
            self._advanced(rows_BM, step, decided_BL, accepted_B, drafts_BH),
            torch.cat([offered_B[:, None], accepted_B[:, None], decided_BL], dim=1),
            logits_TV,
            tokens_T,
            places_BL,
            step.seats_B[rows.sequence_T[: len(tokens_T)]],
        )

    def _draft(
        self, step: AheadInput, rows_BM: torch.Tensor, starts_BH: torch.Tensor, drafts_BH: torch.Tensor
    ) -> torch.Tensor:
        """The drafts of each head, int64 [H, B]; any where a head does not draft."""
        num_sequences, length_B = len(rows_BM), rows_BM[:, _LENGTH]
        drafts_HB = torch.zeros(step.num_heads, num_sequences, dtype=torch.int64, device=self._device)
        if not step.num_heads:
            return drafts_HB
        states_XD = self._worker.states_memory(0)
        starts_HB = starts_BH.T.contiguous()
        counts_HB = torch.where(drafts_BH.T, length_B - 1 - starts_HB, 0)
        keys_HB = torch.where(drafts_BH.T, length_B - 1, 0)
        all_rows = _packed(counts_HB, starts_HB, step.head_shape.num_tokens)
        heads_H1 = torch.arange(step.num_heads, device=self._device)[:, None]
        index_HT = all_rows.position_T + heads_H1 + 1
        confirmed_HT = self._ring(rows_BM, all_rows.sequence_T, index_HT)
        earlier_HT = index_HT - length_B[all_rows.sequence_T]  # the head that drafted the token, if not negative
        source_HT = earlier_HT.clamp(min=0, max=step.num_heads - 1) * num_sequences + all_rows.sequence_T
        state_HT = self._state_places(step.seats_B, all_rows.sequence_T, all_rows.position_T)
        last_HB = (all_rows.first_B + counts_HB - 1).clamp_(min=0)
        for head in range(step.num_heads):
            rows = _Rows(*(value[head] for value in all_rows))
            tokens_T = confirmed_HT[head]
            if head:
                drafted_T = drafts_HB.view(-1).index_select(0, source_HT[head])
                tokens_T = torch.where(earlier_HT[head] < 0, tokens_T, drafted_T)
            layer = len(self._model.config.layers) + head
            forward = self._pass(step, rows, tokens_T, keys_HB[head], step.head_shape, layers=range(layer, layer + 1))
            if forward is None:
                continue
            states_TD = states_XD.index_select(0, state_HT[head][: len(forward.token_ids_T)])
            states_BD = self._worker.run_head(head, forward, states_TD).index_select(0, last_HB[head])
            drafts_HB[head] = self._model.head(states_BD).argmax(dim=-1)
        return drafts_HB

    def _decide(
        self, step: AheadInput, rows_BM: torch.Tensor, rows: _Rows, drafts_HB: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the main layers and keeps their states. Returns the logits of the rows and a token after each."""
        length_B, num_sequences = rows_BM[:, _LENGTH], len(rows_BM)
        length_T = length_B[rows.sequence_T]
        newest_B = rows_BM.gather(1, self._first_token + (length_B[:, None] - 1) % self._ring_positions)[:, 0]
        tokens_LB = torch.cat([newest_B[None], drafts_HB])
        offset_T = torch.where(rows.is_row_T, rows.position_T - length_T + 1, 0)
        tokens_T = tokens_LB.view(-1).index_select(0, offset_T * num_sequences + rows.sequence_T)
        keys_B = torch.where(rows.counts_B > 0, length_B - 1 + rows.counts_B, 0)
        forward = self._pass(
            step, rows, tokens_T, keys_B, step.main_shape, layers=range(len(self._model.config.layers))
        )
        assert forward is not None, "a step has sequences"
        num_rows = len(forward.token_ids_T)
        hidden: Hidden = self._model(forward.token_ids_T, self._worker.context.bind(forward))
        states_XD = self._worker.states_memory(0)
        place_T = self._state_places(step.seats_B, rows.sequence_T, rows.position_T)
        place_T = torch.where(rows.is_row_T, place_T, len(states_XD) - 1)[:num_rows]
        states_XD.index_copy_(0, place_T, self._worker.kept_states(hidden))
        logits_TV = self._model.head(hidden.post_norm_TD)
        decided_T = likeliest(logits_TV)
        if step.draws:
            sequence_T = rows.sequence_T[:num_rows]
            key_T = rows_BM[:, _KEY][sequence_T]
            uniform_T = random_numbers(key_T, rows.position_T[:num_rows] + 1)
            numbers_5T = self._worker.sampling.numbers(step.seats_B[sequence_T])
            decided_T = _drawn(logits_TV, decided_T, numbers_5T, uniform_T, has_filters=step.has_filters)
        return logits_TV, decided_T

    def _advanced(
        self,
        rows_BM: torch.Tensor,
        step: AheadInput,
        decided_BL: torch.Tensor,
        accepted_B: torch.Tensor,
        drafts_BH: torch.Tensor,
    ) -> torch.Tensor:
        """The rows of the sequences after the step.

        The ring gets rejected tokens as well: it is larger than what a head reads again, and the next step overwrites
        them.
        """
        length_B1, new_BM = rows_BM[:, _LENGTH : _LENGTH + 1], rows_BM.clone()
        new_BM[:, _LENGTH] = torch.minimum(length_B1[:, 0] + 1 + accepted_B, step.max_lengths_B)
        new_BM[:, _STATES_START] = torch.maximum(rows_BM[:, _STATES_START], length_B1[:, 0] - 1 - self._num_drafts)
        heads = slice(_HEADS, _HEADS + step.num_heads)
        heads_H = torch.arange(step.num_heads, device=self._device)
        new_BM[:, heads] = torch.where(drafts_BH, (length_B1 - 1 - heads_H).clamp_(min=0), rows_BM[:, heads])
        places_BL = (length_B1 + torch.arange(step.num_heads + 1, device=self._device)) % self._ring_positions
        return new_BM.scatter_(1, self._first_token + places_BL, decided_BL.clamp(min=0))

    def _pass(
        self,
        step: AheadInput,
        rows: _Rows,
        tokens_T: torch.Tensor,
        key_lengths_B: torch.Tensor,
        shape: PassShape,
        *,
        layers: range,
    ) -> PassInput | None:
        """The pass over some layers; None if it has no rows, which only a CPU knows."""
        used = {self._arena.place_of_layer[layer][0] for layer in layers}
        has_page_T = rows.is_row_T & (rows.position_T >= step.whole_from_B[rows.sequence_T])
        groups: list[GroupSlots | None] = [None] * len(step.tables)
        for number in used:
            tables_pBY, P = step.tables[number], self._arena.layout.groups[number].page_positions
            place_T = rows.sequence_T * tables_pBY.shape[2] + rows.position_T // P
            page_pT = torch.where(has_page_T, tables_pBY.flatten(1).index_select(1, place_T), -1).long()
            groups[number] = GroupSlots(tables_pBY.unbind(0), page_pT.unbind(0), rows.position_T % P, None)
        first = shape.longest_key - shape.longest_query
        forward = PassInput(
            tokens_T,
            rows.position_T,
            rows.counts_B.int(),
            key_lengths_B.int(),
            (first,) * shape.num_sequences,
            (shape.longest_key,) * shape.num_sequences,
            tuple(groups),
            shape.num_tokens,
            shape,
        )
        return _exact(forward) if self._is_exact else forward

    def _ring(self, rows_BM: torch.Tensor, sequence_T: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
        """Tokens of sequences at positions that their rings hold."""
        column_T = self._first_token + position_T % self._ring_positions
        return rows_BM.view(-1)[sequence_T * rows_BM.shape[1] + column_T]

    def _state_places(self, seats_B: torch.Tensor, sequence_T: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
        return seats_B[sequence_T] * self._ring_positions + position_T % self._ring_positions


def _packed(counts_B: torch.Tensor, starts_B: torch.Tensor, num_rows: int) -> _Rows:
    """Packs `counts_B` consecutive positions of each sequence from `starts_B` on. A leading dimension is a batch."""
    ends_B = counts_B.cumsum(dim=-1)
    first_B = ends_B - counts_B
    row_T = torch.arange(num_rows, device=counts_B.device).expand(*counts_B.shape[:-1], num_rows).contiguous()
    sequence_T = torch.searchsorted(ends_B, row_T, right=True).clamp_(max=counts_B.shape[-1] - 1)
    is_row_T = row_T < ends_B[..., -1:]
    position_T = torch.where(is_row_T, row_T + (starts_B - first_B).gather(-1, sequence_T), 0)
    return _Rows(counts_B, first_B, sequence_T, position_T, is_row_T)


def _exact(forward: PassInput) -> PassInput | None:
    """The pass without padding, for kernels that need to know its sizes. Reads them from the device."""
    kept_B = forward.query_lengths_B.nonzero()[:, 0]
    queries_B, keys_B = forward.query_lengths_B[kept_B], forward.key_lengths_B[kept_B]
    num_rows = int(queries_B.sum())
    if not num_rows:
        return None
    groups: list[GroupSlots | None] = []
    for slots in forward.groups:
        if slots is None:
            groups.append(None)
            continue
        tables, pages = tuple(t[kept_B] for t in slots.tables_BY), tuple(page[:num_rows] for page in slots.page_T)
        offset_T, rows = slots.offset_T[:num_rows], (pages[0] >= 0).nonzero()[:, 0]
        if len(rows) == num_rows:
            groups.append(GroupSlots(tables, pages, offset_T, None))
        else:
            groups.append(GroupSlots(tables, tuple(page[rows] for page in pages), offset_T[rows], rows))
    return PassInput(
        forward.token_ids_T[:num_rows],
        forward.positions_T[:num_rows],
        queries_B,
        keys_B,
        tuple((keys_B - queries_B).tolist()),
        tuple(keys_B.tolist()),
        tuple(groups),
        num_rows,
    )


def _drawn(
    logits_TV: torch.Tensor,
    likeliest_T: torch.Tensor,
    numbers_5T: torch.Tensor,
    uniform_T: torch.Tensor,
    *,
    has_filters: bool,
) -> torch.Tensor:
    """The token of each row: `likeliest_T` at temperature 0 and where no token can be chosen, else a draw."""
    is_drawn_T = numbers_5T[0] > 0.0
    numbers_5T[0] = torch.where(is_drawn_T, numbers_5T[0], 1.0)
    drawn_T = draw_tokens(logits_TV, numbers_5T, uniform_T, has_filters=has_filters)
    return torch.where(is_drawn_T & (likeliest_T != NO_TOKEN), drawn_T, likeliest_T)


def _with_logprobs(step: AheadInput, done: _Verified, table: SamplingTable) -> AheadOutput:
    sampling = SamplingInput(logprob_seats_R=done.seat_T, num_top_logprobs=step.num_top_logprobs)
    logprobs_T, top_ids_TV, top_logprobs_TV = decided_logprobs(done.logits_TV, done.tokens_T, sampling, table)
    values = (None if value is None else value[done.places_BL] for value in (logprobs_T, top_ids_TV, top_logprobs_TV))
    return AheadOutput(done.results_BX, *values)
