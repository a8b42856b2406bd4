"""The host side of a step: makes a `StepInput` from requests, and applies a `StepOutput` to them.

A decoding step drafts, takes the newest token and the drafts of each sequence, decides a token at every position, and
keeps those up to the first that was not drafted. Plain decoding is the case without drafts. Prompts run in a separate
pass, so the arithmetic of a decoding token does not depend on the prompts of the same step.

The host waits for the device once per step, for the decided tokens. Accepted drafts equal decided tokens, so the host
does not need the drafts, except where a grammar needs them: then it reads them before the main layers run.

`decode` and `prefill` queue the work of a step; `finish_decode` and `finish_prefill` read and apply its results. In
between, the host may queue the next step: without drafts it knows which position a text computes, and the worker puts
the token in. With drafts it does not; `decode_ahead` then queues a step that the worker completes (`engine.ahead`).
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from openmimo.core.records import TokenLogprob
from openmimo.core.registry import load_object
from openmimo.engine.cache import PageArena, PageTables
from openmimo.engine.config import EngineConfig
from openmimo.engine.request_state import NOT_FINITE, Decision, RequestState
from openmimo.engine.sampler import RowChange, SamplingInput, SeatSampling, is_allowed, seat_sampling, uniform
from openmimo.engine.speculative import DraftPlanner, DraftPolicy
from openmimo.engine.stats import EngineStats
from openmimo.engine.step import (
    MAX_SHORT_TOKENS,
    PROMPTS,
    AheadInput,
    AheadOutput,
    DraftInput,
    HeadInput,
    PassShape,
    PromptScores,
    ScoredRows,
    Span,
    StepBuffers,
    StepInput,
    StepOutput,
    draft_rows_of,
    draft_shape,
    padded_prompt_tokens,
    padded_shape,
    prompt_shape,
)
from openmimo.engine.worker import Worker, why_no_graphs
from openmimo.model.attention import kv_spec
from openmimo.model.mimo import MiMo
from openmimo.runtime.device import Arrival

if TYPE_CHECKING:
    from openmimo.engine.structured import StructureState

_PLAIN = SamplingInput()


class Results(NamedTuple):
    """What the host reads of a `StepOutput`. Each field is as there."""

    tokens_R: torch.Tensor | None
    num_accepted_B: torch.Tensor | None
    logprobs_R: torch.Tensor | None
    top_ids_RV: torch.Tensor | None
    top_logprobs_RV: torch.Tensor | None
    routing_TLA: torch.Tensor | None


class DecodeRun(NamedTuple):
    """A decoding step whose work is queued.

    Attributes:
        sequences: The sequences that decode.
        num_drafts: Drafts of each.
        seats: The seat of each.
        output: The results on the device.
        arrival: `Results` on their way.
        policy_version: Version of the weights.
        start: Time at which the step began, in seconds of the runner's clock.
    """

    sequences: list[RequestState]
    num_drafts: list[int]
    seats: list[int]
    output: StepOutput
    arrival: Arrival
    policy_version: int
    start: float


class AheadRun(NamedTuple):
    """A decoding step whose work is queued, and that was planned before the lengths of its sequences were known.

    Attributes:
        sequences: The sequences that decode.
        pages: The page tables that each had.
        limits: The most drafts of each.
        arrival: `AheadOutput` on its way.
        policy_version: Version of the weights.
        start: Time at which the step began, in seconds of the runner's clock.
    """

    sequences: list[RequestState]
    pages: list[PageTables]
    limits: list[int]
    arrival: Arrival
    policy_version: int
    start: float


class AheadPlanner(Protocol):
    """`openmimo.engine.ahead.AheadPlanner`, which is loaded only where steps with drafts are planned ahead."""

    def plan(
        self, sequences: list[RequestState], limits: list[int], *, spare_seat: int, admitted: tuple[SeatSampling, ...]
    ) -> AheadInput:
        """See there."""
        ...

    def follow(self, sequence: RequestState, num_heads: int, num_offered: int) -> None:
        """See there."""
        ...


class AheadWorker(Protocol):
    """`openmimo.engine.ahead.AheadWorker`."""

    def reserve(self) -> int:
        """See there."""
        ...

    def execute(self, step: AheadInput) -> AheadOutput:
        """See there."""
        ...


class Ranks(Protocol):
    """`openmimo.engine.team.Team`, which is loaded only where several devices serve."""

    @property
    def free_bytes(self) -> int:
        """See there."""
        ...

    @property
    def size(self) -> int:
        """See there."""
        ...

    @property
    def model(self) -> MiMo:
        """See there."""
        ...

    @property
    def loss(self) -> str:
        """See there."""
        ...

    def worker(self, arena: PageArena, config: EngineConfig, *, num_drafts: int, max_decided: int) -> Worker:
        """See there."""
        ...

    def whole_shape(self, name: str) -> tuple[int, ...] | None:
        """See there."""
        ...

    def set_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See there."""
        ...

    def text_logprobs(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """See there."""
        ...

    def report(self) -> dict[str, int | list[int] | str]:
        """See there."""
        ...

    def lines(self) -> list[str]:
        """See there."""
        ...

    def on_loss(self, callback: Callable[[], None]) -> None:
        """See there."""
        ...

    def fail(self, reason: str) -> None:
        """See there."""
        ...

    def close(self) -> None:
        """See there."""
        ...


class PrefillRun(NamedTuple):
    """A pass over prompts whose work is queued.

    Attributes:
        sequences: The sequences whose prompts are read.
        starts: The first position of each in the pass.
        ends: The row after the last of each.
        read: The sequences whose last chunk this is.
        scored: The sequences whose prompts are scored, each with the tokens to score.
        output: The results on the device.
        arrival: `Results` on their way.
        policy_version: Version of the weights.
    """

    sequences: list[RequestState]
    starts: list[int]
    ends: list[int]
    read: list[RequestState]
    scored: list[tuple[RequestState, list[int]]]
    output: StepOutput
    arrival: Arrival
    policy_version: int


class Runner:
    """Prepares steps for a worker and applies their results. All state of a request is in its `RequestState`."""

    def __init__(
        self,
        model: MiMo,
        arena: PageArena,
        config: EngineConfig,
        *,
        num_drafts: int,
        draft_policy: DraftPolicy,
        stats: EngineStats,
        plans_ahead: bool = False,
        ranks: Ranks | None = None,
    ):
        self.stats = stats
        reason = (
            "the attention of prompts is computed in int8" if config.integers else why_no_graphs(model, arena.dtype)
        )
        uses_graphs = config.graphs and reason is None and ranks is None
        plans_ahead = plans_ahead and ranks is None
        # A CPU plans ahead in tests only. Without graphs, an accelerator would wait for the host in any case.
        can_draft_ahead = num_drafts > 0 and draft_rows_of(num_drafts) <= MAX_SHORT_TOKENS
        self.drafts_ahead = plans_ahead and can_draft_ahead and (uses_graphs or model.device.type == "cpu")
        self._plans_ahead = plans_ahead and (self.drafts_ahead or not num_drafts)
        if ranks is None:
            self.worker = Worker(
                model, arena, num_drafts=num_drafts, uses_graphs=uses_graphs, max_decided=2 * config.max_sequences,
                integers=config.integers, drafts_ahead=self.drafts_ahead,
            )  # fmt: skip
        else:
            self.worker = ranks.worker(arena, config, num_drafts=num_drafts, max_decided=2 * config.max_sequences)
        self._max_sequences, self._max_positions = config.max_sequences, model.config.max_positions
        self._device = model.device if ranks is None else torch.device("cpu")  # of what is sent to all ranks
        self._draft_policy = draft_policy
        self._routing_dtype = np.uint8 if model.config.moe and model.config.moe.num_experts <= 256 else np.int16
        num_layers = len(model.config.layers)
        prompt_tokens = max(config.prompt_tokens(on_cpu=model.device.type == "cpu"))

        def buffers(layers: range, max_tokens: int) -> StepBuffers:
            return StepBuffers(
                arena,
                self._device,
                layers,
                max_tokens=max_tokens,
                max_sequences=max(config.max_sequences, PROMPTS),
                max_positions=model.config.max_positions,
            )

        decode_tokens = config.max_sequences * max(2 * num_drafts + 2, draft_rows_of(num_drafts))
        self._decode_buffers = buffers(range(num_layers), decode_tokens)
        self._prompt_buffers = buffers(range(num_layers), padded_prompt_tokens(prompt_tokens))
        self._drafting: DraftPlanner | None = None
        if num_drafts:
            assert model.config.mtp is not None
            layers = [range(num_layers + head, num_layers + head + 1) for head in range(num_drafts)]
            self._drafting = DraftPlanner(
                [buffers(layer, decode_tokens) for layer in layers],
                [buffers(layer, prompt_tokens + decode_tokens) for layer in layers],
                keep_positions=kv_spec(model.config.mtp.attention).keep_positions,
                ring_positions=self.worker.ring_positions,
            )
        self._last_landing = 0.0
        # On a CPU, other processes change the wall time of a step, but not which drafts are worth their time.
        self._clock = time.thread_time if model.device.type == "cpu" else time.perf_counter
        self._ahead_planner: AheadPlanner | None = None
        self._ahead_worker: AheadWorker | None = None
        if self.drafts_ahead:
            all_layers = buffers(range(num_layers + num_drafts), config.max_sequences)
            self._start_ahead(arena, all_layers, num_drafts)

    def _start_ahead(self, arena: PageArena, buffers: StepBuffers, num_drafts: int) -> None:
        """Loads what plans steps with drafts ahead."""
        self._ahead_worker = load_object("openmimo.engine.ahead:AheadWorker")(
            self.worker, arena, num_drafts=num_drafts, max_sequences=self._max_sequences
        )
        self._ahead_planner = load_object("openmimo.engine.ahead:AheadPlanner")(
            buffers,
            num_drafts=num_drafts,
            ring_positions=self.worker.ring_positions,
            max_sequences=self._max_sequences,
            max_positions=self._max_positions,
        )

    @property
    def plans_ahead(self) -> bool:
        """Whether a step can be queued before the results of the one before are read."""
        return self._plans_ahead

    def use_draft_policy(self, draft_policy: DraftPolicy) -> None:
        """Replaces the choice of the number of drafts, with what it has learned."""
        self._draft_policy = draft_policy

    def decode(self, sequences: list[RequestState], policy_version: int) -> DecodeRun:
        """Queues a step that adds at least one token to every sequence, and at most one more than it has drafts."""
        start = self._clock()
        num_drafts, limits = [0] * len(sequences), self._draft_limits(sequences)
        if self._drafting:
            num_drafts = [
                self._drafting.num_drafts_of(sequence, limit) for sequence, limit in zip(sequences, limits, strict=True)
            ]
        if self.drafts_ahead:  # the worker does not count these tokens
            for sequence in sequences:
                sequence.followed_pages = None
        output = self._execute(self._decode_input(sequences, num_drafts))
        self.stats.num_prompt_tokens += sum(s.num_computed_tokens < s.prompt_length for s in sequences)
        for place, sequence in enumerate(sequences):
            if sequence.pooled is not None:  # the last token of a prompt may be computed here
                assert output.states_TD is not None
                row = sum(num_drafts[:place]) + place
                _pool_prompt(sequence, sequence.num_computed_tokens, output.states_TD[row : row + 1])
            sequence.num_computed_tokens += 1
            sequence.num_pending_tokens += 1
            sequence.decided_place = place
        seats = [sequence.held_pages.seat for sequence in sequences]
        return DecodeRun(sequences, num_drafts, seats, output, _arrival(output), policy_version, start)

    def _draft_limits(self, sequences: list[RequestState]) -> list[int]:
        """The most drafts of each sequence in the next step.

        It decides from results that may be one step old. A step that is planned ahead uses the same limits
        (`AheadInput.limits_B`).
        """
        if self._drafting is None:
            return [0] * len(sequences)
        return self._draft_policy.choose(
            [sequence.held_pages.seat for sequence in sequences],
            [sequence.arrival for sequence in sequences],
            [min(self._drafting.num_drafts, sequence.max_new_tokens_left - 1) for sequence in sequences],
        )

    def decode_ahead(self, sequences: list[RequestState], policy_version: int) -> "AheadRun | DecodeRun":
        """As `decode`, but before the results of the step before are read."""
        if self._ahead_planner is None or self._ahead_worker is None:
            return self.decode(sequences, policy_version)
        start = self._clock()
        limits = self._draft_limits(sequences)
        admitted: tuple[SeatSampling, ...] = ()
        if not all(sequence.is_plain for sequence in sequences):
            admitted = tuple(self._admit(s) for s in sequences if s.sampled_pages is not s.pages)
        spare_seat = self._ahead_worker.reserve()
        step = self._ahead_planner.plan(sequences, limits, spare_seat=spare_seat, admitted=admitted)
        output = self._ahead_worker.execute(step)
        self._count_pass(is_captured=step.is_captured)
        self.stats.num_prompt_tokens += sum(s.num_computed_tokens < s.prompt_length for s in sequences)
        for sequence, limit in zip(sequences, limits, strict=True):
            sequence.num_computed_tokens += 1
            sequence.num_pending_tokens += 1
            sequence.num_possible_tokens += limit
        pages = [sequence.held_pages for sequence in sequences]
        return AheadRun(sequences, pages, limits, Arrival(tuple(output)), policy_version, start)

    def _finish_ahead(self, run: AheadRun) -> list[RequestState]:
        """As `finish_decode`, for a step that was planned ahead."""
        assert self._ahead_planner is not None
        results_BX, *others = run.arrival.wait()
        assert results_BX is not None
        output, touched = AheadOutput(results_BX, *others), []
        offered, accepted = [], []
        for row, (sequence, pages, limit) in enumerate(zip(run.sequences, run.pages, run.limits, strict=True)):
            num_offered, num_accepted, *tokens = output.results_BX[row].tolist()
            offered.append(num_offered)
            accepted.append(num_accepted)
            if not sequence.finish_reason:
                touched.append(sequence)
                if sequence.pages is pages:
                    self._ahead_planner.follow(sequence, max(run.limits), num_offered)
            sequence.num_pending_tokens -= 1
            sequence.num_possible_tokens -= limit
            if not sequence.finish_reason:
                self._confirm(
                    sequence,
                    _row_decisions(output, row, tokens[: num_accepted + 1], sequence.params.top_logprobs),
                    num_offered=num_offered,
                    policy_version=run.policy_version,
                    is_computed=sequence.pages is pages,
                )
        self._count_step(touched)
        now = self._clock()  # the step began when the one before had ended
        seats = [pages.seat for pages in run.pages]
        self._learn(run.sequences, seats, run.limits, offered, accepted, now - max(run.start, self._last_landing))
        self._last_landing = now
        return touched

    def finish_decode(self, run: "DecodeRun | AheadRun") -> list[RequestState]:
        """Applies the results of a decoding step. Returns the sequences that had not ended before."""
        if isinstance(run, AheadRun):
            return self._finish_ahead(run)
        results = Results(*run.arrival.wait())
        decided, routing = _decisions(results, run.sequences, run.num_drafts), self._routing(results)
        accepted = [0] * len(run.sequences) if results.num_accepted_B is None else results.num_accepted_B.tolist()
        first, touched = 0, []
        for sequence, num_accepted, num_offered in zip(run.sequences, accepted, run.num_drafts, strict=True):
            sequence.num_pending_tokens -= 1
            if not sequence.finish_reason:  # else it ended while this step was on its way
                touched.append(sequence)
                self._confirm(
                    sequence,
                    decided[first : first + num_accepted + 1],
                    num_offered=num_offered,
                    policy_version=run.policy_version,
                )
                if sequence.params.routed_experts:
                    assert routing is not None
                    num_new = min(sequence.num_computed_tokens - len(sequence.routing), num_offered + 1)
                    sequence.routing.append(routing[first : first + num_new])
            first += num_offered + 1
        self._count_step(touched)
        seconds = self._clock() - run.start
        self._learn(run.sequences, run.seats, run.num_drafts, run.num_drafts, accepted, seconds)
        return touched

    def _learn(
        self,
        sequences: list[RequestState],
        seats: list[int],
        planned: list[int],
        offered: list[int],
        accepted: list[int],
        seconds: float,
    ) -> None:
        """Shows a step to the policy of drafts.

        Args:
            sequences: The sequences of the step.
            seats: Their seats in it.
            planned: The drafts of each that the step had room for.
            offered: The drafts of each.
            accepted: Those that were right.
            seconds: The time of the step.
        """
        if self._drafting is not None:
            self._draft_policy.judge(seats, [sequence.arrival for sequence in sequences], offered, accepted)
            self._draft_policy.observe(planned, len(sequences) + sum(accepted), seconds)

    def _count_step(self, touched: list[RequestState]) -> None:
        if touched:
            self.stats.num_steps += 1
            self.stats.sequence_steps += len(touched)

    def prefill(self, prefills: list[tuple[RequestState, int]], policy_version: int) -> PrefillRun:
        """Queues chunks of prompts, each up to its stop. A sequence whose last chunk this is gets its next token."""
        sequences = [sequence for sequence, _ in prefills]
        starts = [sequence.num_computed_tokens for sequence in sequences]
        counts = [stop - start for start, (_, stop) in zip(starts, prefills, strict=True)]
        ends = list(itertools.accumulate(counts))
        last = [(s, end - 1) for (s, stop), end in zip(prefills, ends, strict=True) if stop == len(s.tokens)]
        read = [sequence for sequence, _ in last]
        step, scored = self._prefill_input(prefills, read, [row for _, row in last], counts)
        output = self._execute(step)
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.num_computed_tokens += count
        for place, sequence in enumerate(read):
            sequence.num_pending_tokens += 1
            sequence.decided_place = self._max_sequences + place
        if self._drafting:
            self._drafting.forget_old_states(sequences)
        self.stats.num_prompt_tokens += sum(counts)
        return PrefillRun(sequences, starts, ends, read, scored, output, _arrival(output), policy_version)

    def finish_prefill(self, run: PrefillRun) -> list[RequestState]:
        """Applies the results of a pass over prompts. Returns the sequences that gained a token or ended."""
        results = Results(*run.arrival.wait())
        self._last_landing = self._clock()
        routing = self._routing(results)
        running = [sequence for sequence in run.sequences if not sequence.finish_reason]
        for (sequence, targets), scores in zip(run.scored, run.output.prompt_scores, strict=True):
            _add_prompt_logprobs(sequence, targets, scores)
        for sequence, start, first, end in zip(run.sequences, run.starts, [0, *run.ends], run.ends, strict=False):
            if sequence.pooled is not None:
                assert run.output.states_TD is not None
                _pool_prompt(sequence, start, run.output.states_TD[first:end])
            if sequence.params.routed_experts:
                assert routing is not None
                sequence.routing.append(routing[first:end])
        if run.read:
            for sequence, decision in zip(run.read, _decisions(results, run.read, [0] * len(run.read)), strict=True):
                sequence.num_pending_tokens -= 1
                if not sequence.finish_reason:
                    sequence.add(decision, drafted=False, policy_version=run.policy_version)
                    self.stats.num_new_tokens += 1
                if sequence.finish_reason:
                    sequence.num_computed_tokens = min(sequence.num_computed_tokens, len(sequence.tokens) - 1)
        return [sequence for sequence in running if sequence in run.read or sequence.finish_reason]

    def _execute(self, step: StepInput) -> StepOutput:
        output = self.worker.execute(step)
        self._count_pass(is_captured=step.main.shape is not None)
        return output

    def _count_pass(self, *, is_captured: bool) -> None:
        graphs = self.worker.graphs
        if not is_captured:
            self.stats.num_other_passes += 1
        elif graphs is not None:
            self.stats.num_graph_passes += 1
            self.stats.num_graphs, self.stats.graph_seconds = graphs.num_captured, graphs.capture_seconds
            self.stats.graph_bytes = graphs.num_bytes

    def _decode_input(self, sequences: list[RequestState], num_drafts: list[int]) -> StepInput:
        values = self._decode_buffers.values
        heads: tuple[HeadInput, ...] = ()
        width = len(sequences)
        if self._drafting:
            heads, width = self._drafting.draft(sequences, num_drafts, self._draft_shape(sequences))
        drafts: list[list[int]] = [[] for _ in sequences]
        if heads and any(sequence.structure is not None for sequence in sequences):
            # The masks of a grammar depend on the drafts, so the host needs them first.
            drafts_BH = self.worker.draft(heads, width)[:, : len(sequences)].T.tolist()
            drafts = [known[:number] for known, number in zip(drafts_BH, num_drafts, strict=True)]
        spans: list[Span] = []
        tokens: list[int] = []
        draft_rows: list[int] = []  # the row before each draft
        padded_rows: list[int] = []
        sources: list[int] = []
        num_rows, num_columns = sum(num_drafts) + len(sequences), max(num_drafts)
        for index, (sequence, number) in enumerate(zip(sequences, num_drafts, strict=True)):
            computed, first = sequence.num_computed_tokens, len(tokens)
            spans.append(Span(sequence.held_pages, computed, computed + 1 + number))
            tokens.append(-1 - sequence.decided_place if sequence.num_pending_tokens else sequence.tokens[-1])
            if number:
                tokens += drafts[index] or [0] * number
                draft_rows += range(first + 1, first + 1 + number)
                sources += range(index, index + number * width, width)
            if num_columns:
                padded_rows += [*range(first, first + number), *[num_rows - 1] * (num_columns - number)]
        drafting = draft_rows_BK = None
        if num_columns:
            draft_rows_BK = values("verified_rows", padded_rows).view(len(sequences), num_columns)
            if not any(drafts):
                rows_N, sources_N = values("draft_rows", draft_rows), values("draft_sources", sources)
                drafting = DraftInput(heads, width, rows_N, sources_N)
        return self._step_input(
            self._decode_buffers,
            sequences,
            spans,
            tokens,
            sampling=self._sampling_input(self._decode_buffers, sequences, num_drafts, drafts),
            decided_place=None if self._drafting else 0,  # with drafts, the engine reads the results of this step first
            drafting=drafting,
            draft_rows_BK=draft_rows_BK,
            shape=self._graph_shape(sequences, spans, 1 + num_columns),
        )

    def _draft_shape(self, sequences: list[RequestState]) -> PassShape | None:
        """The shape of the captured passes of the drafting heads; None if none are."""
        if self.worker.graphs is None or self._drafting is None:
            return None
        return draft_shape(
            len(sequences),
            self._drafting.num_drafts,
            max(sequence.num_computed_tokens for sequence in sequences),
            max_sequences=self._max_sequences,
            max_positions=self._max_positions,
        )

    def _graph_shape(self, sequences: list[RequestState], spans: list[Span], longest_query: int) -> PassShape | None:
        """The shape of the captured graph that runs a decoding pass; None if none does."""
        if self.worker.graphs is None or any(sequence.params.routed_experts for sequence in sequences):
            return None
        return padded_shape(
            len(spans),
            longest_query,
            max(span.stop for span in spans),
            max_sequences=self._max_sequences,
            max_positions=self._max_positions,
        )

    def _prompt_shape(self, sequences: list[RequestState], spans: list[Span], num_tokens: int) -> PassShape | None:
        """The shape of the captured graph that reads prompts; None if none does."""
        graphs = self.worker.graphs
        if graphs is None or any(sequence.params.routed_experts for sequence in sequences):
            return None
        if padded_prompt_tokens(num_tokens) > graphs.max_prompt_tokens:
            return None
        longest_key = max(span.stop for span in spans)
        return prompt_shape(len(spans), num_tokens, longest_key, max_positions=self._max_positions)

    def _prefill_input(
        self,
        prefills: list[tuple[RequestState, int]],
        read: list[RequestState],
        last_rows: list[int],
        counts: list[int],
    ) -> tuple[StepInput, list[tuple[RequestState, list[int]]]]:
        """The step, and the sequences whose prompts it scores, each with the tokens to score."""
        spans = [Span(sequence.held_pages, sequence.num_computed_tokens, stop) for sequence, stop in prefills]
        tokens = [
            token for sequence, stop in prefills for token in sequence.tokens[sequence.num_computed_tokens : stop]
        ]
        heads = self._drafting.follow_prompt(prefills) if self._drafting else ()
        sequences = [sequence for sequence, _ in prefills]
        rows, scored = self._scored_rows(sequences, counts)
        buffers = self._prompt_buffers
        step = self._step_input(
            buffers,
            sequences,
            spans,
            tokens,
            sampling=self._sampling_input(buffers, read, [0] * len(read), [[]] * len(read)) if read else None,
            decided_place=self._max_sequences,
            prompt_heads=heads,
            shape=self._prompt_shape(sequences, spans, len(tokens)),
            decided_rows_R=buffers.values("decided_rows", last_rows) if read else None,
            scored=rows,
        )
        return step, scored

    def _scored_rows(
        self, sequences: list[RequestState], counts: list[int]
    ) -> tuple[tuple[ScoredRows, ...], list[tuple[RequestState, list[int]]]]:
        """The rows of a pass over the next `counts` tokens whose following prompt tokens are scored, if requested."""
        found: list[tuple[RequestState, list[int]]] = []
        places: list[int] = []
        first_row = 0
        for sequence, count in zip(sequences, counts, strict=True):
            computed = sequence.num_computed_tokens
            first = max(computed, len(sequence.prompt_logprobs))  # some are known if a preempted prompt is read again
            stop = min(computed + count, sequence.prompt_length - 1)
            if sequence.params.prompt_logprobs and first < stop:
                found.append((sequence, sequence.tokens[first + 1 : stop + 1]))
                places.append(first_row + first - computed)
            first_row += count
        if not found:
            return (), found
        targets_N = self._prompt_buffers.values("targets", [token for _, targets in found for token in targets])
        pieces = targets_N.split([len(targets) for _, targets in found])
        rows = tuple(
            ScoredRows(
                place,
                place + len(piece),
                piece,
                sequence.params.temperature or 1.0,
                sequence.params.prompt_top_logprobs,
            )
            for place, piece, (sequence, _) in zip(places, pieces, found, strict=True)
        )
        return rows, found

    def _sampling_input(
        self,
        buffers: StepBuffers,
        sequences: list[RequestState],
        num_drafts: list[int],
        drafts: list[list[int]],
    ) -> SamplingInput:
        """The sampling of the rows after the newest token of each sequence and after each of its drafts.

        Args:
            drafts: The drafts of each sequence that the host knows; empty where it does not need them.
        """
        if all(sequence.is_plain for sequence in sequences):
            return _PLAIN
        admitted: list[SeatSampling] = []
        new_tokens: list[tuple[int, list[int]]] = []
        changes: list[RowChange] = []
        all_seats: list[int] = []
        seats: list[int] = []
        rows: list[int] = []
        uniforms: list[float] = []
        for sequence, number, known in zip(sequences, num_drafts, drafts, strict=True):
            params, seat, first = sequence.params, sequence.held_pages.seat, len(all_seats)
            if sequence.sampled_pages is not sequence.pages:
                admitted.append(self._admit(sequence))
            if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
                new = sequence.tokens[sequence.prompt_length + sequence.num_counted_tokens :]
                sequence.num_counted_tokens += len(new)
                if new:
                    new_tokens.append((seat, new))
            if params.changes_logits:
                changes += row_changes(sequence, first, number, known)
            if params.temperature > 0.0:
                seats += [seat] * (number + 1)
                rows += range(first, first + number + 1)
                length = len(sequence.tokens) + sequence.num_pending_tokens
                uniforms += [uniform(sequence.seed, length + offset) for offset in range(number + 1)]
            all_seats += [seat] * (number + 1)
        every = [sequence.params for sequence in sequences]
        values, is_sampled = buffers.values, bool(rows)
        return SamplingInput(
            admitted=tuple(admitted),
            new_tokens=tuple(new_tokens),
            seats_S=values("sampled_seats", seats) if is_sampled else None,
            uniform_S=values("uniforms", uniforms, torch.float64) if is_sampled else None,
            sampled_rows_S=values("sampled_rows", rows) if is_sampled and len(rows) < len(all_seats) else None,
            has_filters=any(p.temperature > 0.0 and p.has_filters for p in every),
            changes=tuple(changes),
            logprob_seats_R=values("seats", all_seats) if any(p.logprobs or p.top_logprobs for p in every) else None,
            num_top_logprobs=max(p.top_logprobs for p in every),
        )

    def _admit(self, sequence: RequestState) -> SeatSampling:
        """The parameters of a sequence whose seat the worker has not got, or has with those of an earlier request."""
        sequence.sampled_pages = sequence.held_pages
        sequence.num_counted_tokens = 0
        return seat_sampling(
            sequence.held_pages.seat,
            sequence.params,
            prompt=sequence.request.prompt_token_ids,
            stop_ids=sequence.stop_ids,
            device=self._device,
        )

    def _step_input(
        self,
        buffers: StepBuffers,
        sequences: list[RequestState],
        spans: list[Span],
        tokens: list[int],
        *,
        sampling: SamplingInput | None,
        decided_place: int | None,
        drafting: DraftInput | None = None,
        prompt_heads: tuple[HeadInput, ...] = (),
        decided_rows_R: torch.Tensor | None = None,
        draft_rows_BK: torch.Tensor | None = None,
        scored: tuple[ScoredRows, ...] = (),
        shape: PassShape | None = None,
    ) -> StepInput:
        places_T, rows_T = self._drafting.state_places(spans, buffers) if self._drafting else (None, None)
        main = buffers.fill(spans, tokens, shape)
        buffers.send()
        return StepInput(
            main=main,
            drafting=drafting,
            state_places_T=places_T,
            state_rows_T=rows_T,
            prompt_heads=prompt_heads,
            decided_rows_R=decided_rows_R,
            sampling=sampling,
            draft_rows_BK=draft_rows_BK,
            scored=scored,
            records_routing=any(sequence.params.routed_experts for sequence in sequences),
            returns_states=any(sequence.pooled is not None for sequence in sequences),
            reads_decided=any(sequence.num_pending_tokens for sequence in sequences),
            decided_place=decided_place if self._plans_ahead else None,
        )

    def _confirm(
        self,
        sequence: RequestState,
        decided: list[Decision],
        *,
        num_offered: int,
        policy_version: int,
        is_computed: bool = True,
    ) -> None:
        """Adds the accepted ones of `num_offered` drafts and the token after them to a sequence.

        Args:
            is_computed: Whether the sequence still has the pages with the keys of these drafts.
        """
        length_before, num_accepted = len(sequence.tokens), len(decided) - 1
        for index, decision in enumerate(decided):
            if not sequence.finish_reason:
                sequence.add(decision, drafted=index < num_accepted, policy_version=policy_version)
        num_new = len(sequence.tokens) - length_before
        # A text that ended among its drafts has fewer tokens than were accepted, and none of its pending ones.
        if is_computed:
            sequence.num_computed_tokens += num_accepted
        if sequence.finish_reason:
            sequence.num_computed_tokens = min(sequence.num_computed_tokens, len(sequence.tokens) - 1)
        if self._drafting:
            sequence.count_drafts(num_offered, num_accepted)
            self.stats.count_drafts(num_offered, num_accepted)
        self.stats.num_decoded_tokens += num_new
        self.stats.num_new_tokens += num_new

    def _routing(self, results: Results) -> np.ndarray | None:
        """The routed experts of a pass, [T, L, A], if recorded."""
        return None if results.routing_TLA is None else results.routing_TLA.numpy().astype(self._routing_dtype)


def _arrival(output: StepOutput) -> Arrival:
    """`Results` of a step on their way to the host."""
    return Arrival(tuple(getattr(output, name) for name in Results._fields))


def _add_prompt_logprobs(sequence: RequestState, targets: list[int], scores: PromptScores) -> None:
    """Adds log-probabilities of prompt tokens. Ends the sequence with an error if one is not finite."""
    logprobs = scores.logprobs_N.tolist()
    if not all(map(math.isfinite, logprobs)):
        sequence.finish("error", NOT_FINITE)
        return
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(targets)
    if scores.top_ids_NV is not None and scores.top_logprobs_NV is not None:
        pairs = zip(scores.top_ids_NV.tolist(), scores.top_logprobs_NV.tolist(), strict=True)
        tops = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    sequence.prompt_logprobs += [TokenLogprob(*entry) for entry in zip(targets, logprobs, tops, strict=True)]


def _pool_prompt(sequence: RequestState, start: int, states_TD: torch.Tensor) -> None:
    """Adds the prompt positions from `start` on to an embedding, except those of a preempted prompt that it has."""
    assert sequence.pooled is not None
    skipped = sequence.pooled.num_positions - start
    new_TD = states_TD[max(skipped, 0) : sequence.prompt_length - start]
    if len(new_TD):
        sequence.pooled.add(new_TD, pooling=sequence.params.pooling)


def _decisions(output: Results, sequences: list[RequestState], num_drafts: list[int]) -> list[Decision]:
    """The decided tokens, with log-probabilities if the step computed any."""
    assert output.tokens_R is not None
    tokens = output.tokens_R.tolist()
    if output.logprobs_R is None:
        return [Decision(token) for token in tokens]
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if output.top_ids_RV is not None and output.top_logprobs_RV is not None:
        numbers = [s.params.top_logprobs for s, n in zip(sequences, num_drafts, strict=True) for _ in range(n + 1)]
        pairs = zip(output.top_ids_RV.tolist(), output.top_logprobs_RV.tolist(), numbers, strict=True)
        tops = [tuple(zip(ids, values, strict=True))[:number] for ids, values, number in pairs]
    return [Decision(*entry) for entry in zip(tokens, output.logprobs_R.tolist(), tops, strict=True)]


def _row_decisions(output: AheadOutput, row: int, tokens: list[int], num_top: int) -> list[Decision]:
    """The decided tokens of one sequence of a step that was planned ahead."""
    if output.logprobs_BL is None:
        return [Decision(token) for token in tokens]
    logprobs = output.logprobs_BL[row].tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if num_top and output.top_ids_BLV is not None and output.top_logprobs_BLV is not None:
        pairs = zip(output.top_ids_BLV[row].tolist(), output.top_logprobs_BLV[row].tolist(), strict=True)
        tops = [tuple(zip(ids, values, strict=True))[:num_top] for ids, values in pairs]
    return [Decision(*entry) for entry in zip(tokens, logprobs, tops, strict=False)]


def row_changes(sequence: RequestState, first_row: int, num_drafts: int, drafts: list[int]) -> list[RowChange]:
    """The logit changes at each position to decide, if the drafts before it are accepted.

    After a draft that the structure forbids, no mask is computed: that draft cannot be accepted.

    Args:
        drafts: The drafts themselves, if the sequence has a structure.
    """
    new_tokens = len(sequence.tokens) + sequence.num_pending_tokens - sequence.prompt_length
    min_tokens = sequence.params.min_tokens
    masks = [None] * (num_drafts + 1) if sequence.structure is None else _masks(sequence, sequence.structure, drafts)
    seat = sequence.held_pages.seat
    return [
        RowChange(first_row + offset, seat, offset, new_tokens + offset < min_tokens, allowed)
        for offset, allowed in enumerate(masks)
    ]


def _masks(sequence: RequestState, structure: "StructureState", drafts: list[int]) -> list[np.ndarray | None]:
    """What the structure allows after the text and after each of its drafts, as in `RowChange`."""
    masks: list[np.ndarray | None] = [structure.allowed_bits()]
    num_accepted, is_open = 0, True
    for draft in drafts:
        allowed = masks[-1]
        is_open = is_open and allowed is not None and is_allowed(allowed, draft) and draft not in sequence.stop_ids
        if is_open:
            structure.accept(draft)
            num_accepted += 1
        masks.append(structure.allowed_bits() if is_open else None)
    if num_accepted:
        structure.rollback(num_accepted)
    return masks
