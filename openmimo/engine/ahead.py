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

The arithmetic of rows is an operation of its own (`kernels/drafting`). B sequences, A admitted ones, T rows of a pass,
Q rows of all passes, H heads that draft, L = H + 1, M numbers of a row, p parts of a group of layers, Y rows of a page
table, X seats, D model dim, V vocabulary.
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
    seed_key,
)
from openmimo.engine.step import (
    AdmittedRows,
    AheadInput,
    AheadOutput,
    GroupSlots,
    PassInput,
    StepBuffers,
    ahead_shapes,
)
from openmimo.engine.worker import Worker
from openmimo.kernels.operations import (
    ROW_HEADS,
    DraftingRows,
    DraftingSizes,
    advance_texts,
    drafting_slots,
    draw_tokens,
    insert_drafts,
    plan_drafting,
)
from openmimo.model.backbone import Hidden
from openmimo.runtime.device import uploaded


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


class _Verified(NamedTuple):
    """The results of the part of a step that is captured.

    Attributes:
        rows_BM: The rows of the sequences after the step.
        results_BX: As in `AheadOutput`.
        logits_TV: Logits of the main pass.
        tokens_T: Decided tokens.
        first_B: The first row of each sequence in the main pass.
        seat_T: The seat of each row.
    """

    rows_BM: torch.Tensor
    results_BX: torch.Tensor
    logits_TV: torch.Tensor
    tokens_T: torch.Tensor
    first_B: torch.Tensor
    seat_T: torch.Tensor


class _Slots(NamedTuple):
    """Pages and offsets of all rows of a step in one group of layers; see `drafting_slots`."""

    page_pQ: torch.Tensor
    offset_Q: torch.Tensor


class AheadWorker:
    """The device side. It shares the cache, the states and the sampling parameters of a `Worker`.

    Args:
        worker: The worker.
        arena: Its cache.
        num_drafts: Heads that may draft.
        max_sequences: Limit of the engine. There is room for these seats from the start, because memory that grows
            costs the graphs that read it.
    """

    def __init__(self, worker: Worker, arena: PageArena, *, num_drafts: int, max_sequences: int):
        self._worker, self._arena, self._max_sequences = worker, arena, max_sequences
        self._model, self._device = worker.model, worker.model.device
        self._num_drafts, self._ring_positions = num_drafts, worker.ring_positions
        self._first_token = ROW_HEADS + num_drafts
        self._rows_XM = torch.zeros(1, self._first_token + self._ring_positions, dtype=torch.int64, device=self._device)
        self._is_exact = self._device.type == "cpu"
        self._captured_from: tuple[int, ...] = ()

    def reserve(self) -> int:
        """Makes room for rows, states and parameters of all seats and one more. Returns the last seat, of no text."""
        least = max(self._arena.num_seats, self._max_sequences) + 1
        num_seats = len(self._worker.states_memory(least)) // self._ring_positions
        if len(self._rows_XM) < num_seats:
            grown_XM = self._rows_XM.new_zeros(num_seats, self._rows_XM.shape[1])
            grown_XM[: len(self._rows_XM)] = self._rows_XM
            self._rows_XM = grown_XM
        self._worker.sampling.reserve(num_seats)
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
        memory = (
            *(len(self._rows_XM), self._rows_XM.data_ptr(), len(states_XD), states_XD.data_ptr()),
            self._worker.sampling.address,
        )
        if memory != self._captured_from:  # a graph reads from the addresses of its capture
            graphs.forget_ahead()
            self._captured_from = memory
        key = (step.main_shape, step.head_shape, step.draws, step.has_filters)
        return graphs.replay_ahead(key, lambda: self._verify(step))

    def _verify(self, step: AheadInput) -> _Verified:
        """A step, without writing the rows of the sequences. Doing it twice changes nothing."""
        states_XD, H = self._worker.states_memory(0), step.num_heads
        sizes = DraftingSizes(
            H,
            self._num_drafts,
            self._ring_positions,
            step.head_shape.num_tokens,
            step.main_shape.num_tokens,
            spare_place=len(states_XD) - 1,
        )
        rows = plan_drafting(self._rows_XM, step.seats_B, step.limits_B, step.max_lengths_B, sizes)
        slots = [
            _Slots(*drafting_slots(tables_pBY, rows, step.whole_from_B, group.page_positions))
            for tables_pBY, group in zip(step.tables, self._arena.layout.groups, strict=True)
        ]
        for head in range(H):
            self._draft(step, head, rows, slots)
        main = slice(H * step.head_shape.num_tokens, sizes.num_rows)
        forward = self._pass(step, H, rows, slots, main)
        assert forward is not None, "a step has sequences"
        main = slice(main.start, main.start + len(forward.token_ids_T))
        hidden: Hidden = self._model(forward.token_ids_T, self._worker.context.bind(forward))
        states_XD.index_copy_(0, rows.state_Q[main], self._worker.kept_states(hidden))
        logits_TV, seat_T = self._model.head(hidden.post_norm_TD), rows.seat_Q[main]
        tokens_T = likeliest(logits_TV)
        if step.draws:
            numbers_5T = self._worker.sampling.numbers(seat_T)
            tokens_T = _drawn(logits_TV, tokens_T, numbers_5T, rows.uniform_Q[main], has_filters=step.has_filters)
        rows_BM, results_BX = advance_texts(self._rows_XM, step.seats_B, step.max_lengths_B, rows, tokens_T, sizes)
        return _Verified(rows_BM, results_BX, logits_TV, tokens_T, rows.first_LB[H], seat_T)

    def _draft(self, step: AheadInput, head: int, rows: DraftingRows, slots: list[_Slots]) -> None:
        """Runs a head, and puts its drafts into `rows.tokens_LB`: any tokens where it does not draft."""
        first = head * step.head_shape.num_tokens
        forward = self._pass(step, head, rows, slots, slice(first, first + step.head_shape.num_tokens))
        if forward is None:
            return
        place_T = rows.state_Q[first : first + len(forward.token_ids_T)]
        states_TD = self._worker.run_head(head, forward, self._worker.states_memory(0).index_select(0, place_T))
        logits_BV = self._model.head(states_TD.index_select(0, rows.last_LB[head]))
        torch.argmax(logits_BV, dim=-1, out=rows.tokens_LB[1 + head])

    def _pass(
        self, step: AheadInput, number: int, rows: DraftingRows, slots: list[_Slots], own: slice
    ) -> PassInput | None:
        """The pass of a head, or of the main layers after them; None if it has no rows, which only a CPU knows."""
        is_main, num_layers = number == step.num_heads, len(self._model.config.layers)
        shape = step.main_shape if is_main else step.head_shape
        layers = range(num_layers) if is_main else range(num_layers + number, num_layers + number + 1)
        groups: list[GroupSlots | None] = [None] * len(slots)
        for group in {self._arena.place_of_layer[layer][0] for layer in layers}:
            pages = slots[group].page_pQ[:, own].unbind(0)
            groups[group] = GroupSlots(step.tables[group].unbind(0), pages, slots[group].offset_Q[own], None)
        forward = PassInput(
            insert_drafts(rows.token_Q[own], rows.source_Q[own], rows.tokens_LB),
            rows.position_Q[own],
            rows.counts_LB[number],
            rows.keys_LB[number],
            (shape.longest_key - shape.longest_query,) * shape.num_sequences,
            (shape.longest_key,) * shape.num_sequences,
            tuple(groups),
            shape.num_tokens,
            shape,
        )
        return _exact(forward) if self._is_exact else forward


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
    places_L = torch.arange(step.num_heads + 1, device=done.tokens_T.device)
    places_BL = (done.first_B[:, None] + places_L).clamp_(max=len(done.tokens_T) - 1)
    values = (None if value is None else value[places_BL] for value in (logprobs_T, top_ids_TV, top_logprobs_TV))
    return AheadOutput(done.results_BX, *values)
