"""Exact speculative decoding with the model's MTP heads (paper section 2.3 and table 10): the host's plan.

Exactness. The token of each position is decided from the model's distribution with the random number of that position,
as in plain decoding. A draft equal to it only means that the next position is already computed. (In terms of
speculative sampling, arXiv 2211.17192: a draft d proposed with certainty is kept with probability p(d); otherwise the
token follows p without d, renormalized.) Only rounding differs: a pass over several tokens may differ from one over a
single token in the last bits.

Positions. Head k at position i reads the main model's state at i and token i+1+k, and predicts token i+2+k. With n
confirmed tokens t0 to t(n-1), the main layers have computed n-1 positions, the newest of which is n-2. With n = 6 and
drafts d6, d7, d8, the heads read these tokens next to the states:

    position    0    1    2    3    4
    head 0      t1   t2   t3   t4   t5   -> d6
    head 1      t2   t3   t4   t5   d6   -> d7
    head 2      t3   t4   t5   d6   d7   -> d8

So head k reads drafts at its last k positions. The next round computes these positions again from confirmed tokens
(`head_lengths` excludes them), so no cached row of a head depends on a draft.

This file plans the passes of the heads; `Worker` runs them.

Chooses the number of drafting heads that gives the most tokens per second, from measurements.

More drafts mean more accepted tokens, with falling returns, and a more expensive step. Each number is tried a few times
per batch size (in powers of two), because a batch that fills the machine pays for every rejected token. Then the best
number is used, and a neighbor is tried every 128 steps. Acceptance and step times are running averages.
The choice changes speed only: the text is the same with any number of drafts.
"""

import math

import torch

from openmimo.engine.request_state import RequestState
from openmimo.engine.step import HeadInput, PassShape, Span, StepBuffers

_Work = tuple[RequestState, int, int]  # a sequence, and the positions `start` to `stop` that a head computes


class DraftPlanner:
    """Plans the passes of the drafting heads over several sequences at once.

    A head that was idle for some steps, or starts after a reused prefix, has no keys for the positions between. It
    reads the old contents of its pages there, so its drafts may be worse until its window has passed. Output does not
    change: drafts are verified.

    Args:
        decode_buffers: Buffers for the pass of each head before a decoding step.
        prompt_buffers: Buffers for the pass of each head over prompts.
        keep_positions: Positions that a head caches (None: all).
        ring_positions: As in `Worker`.
    """

    def __init__(
        self,
        decode_buffers: list[StepBuffers],
        prompt_buffers: list[StepBuffers],
        *,
        keep_positions: int | None,
        ring_positions: int,
    ):
        self.num_drafts = len(decode_buffers)
        self._decode_buffers, self._prompt_buffers = decode_buffers, prompt_buffers
        self._keep_positions = keep_positions
        self._ring_positions = ring_positions

    def follow_prompt(self, prefills: list[tuple[RequestState, int]]) -> tuple[HeadInput, ...]:
        """The passes that bring the heads up to date with prompts that are read in the same step.

        A head computes only positions whose shifted token is known, and skips those that will be outside its window
        when it first drafts.

        Args:
            prefills: Sequences, each with the position at which the main layers stop in this step.
        """
        heads = []
        for head in range(self.num_drafts):
            work: list[_Work] = []
            places: list[int] = []
            first_row = 0
            for sequence, main_stop in prefills:
                known = len(sequence.tokens) - 1 - head
                stop = min(main_stop, known)
                if self._keep_positions is not None:
                    first_needed = known - self._keep_positions - self.num_drafts
                    sequence.head_lengths[head] = max(sequence.head_lengths[head], min(first_needed, stop))
                # After a prefix hit the worker has no states of earlier positions, so the head skips these.
                start = max(sequence.head_lengths[head], sequence.states_start)
                if stop > start:
                    work.append((sequence, start, stop))
                    places += self._places(sequence, start, min(stop, sequence.num_computed_tokens))
                    begin = max(start, sequence.num_computed_tokens) - sequence.num_computed_tokens
                    places += [-1 - first_row - row for row in range(begin, stop - sequence.num_computed_tokens)]
                    sequence.head_lengths[head] = stop
                first_row += main_stop - sequence.num_computed_tokens
            if work:
                buffers = self._prompt_buffers[head]
                heads.append(self._head_input(buffers, head, work, places, range(len(work)), len(work)))
        return tuple(heads)

    def num_drafts_of(self, sequence: RequestState, num_heads: int) -> int:
        """How many of `num_heads` heads draft for a sequence: a step adds one token more than it has drafts.

        None can if the first head has no position to compute: before the first position, after a cached prefix, and
        after a chunk that leaves one token of a prompt. Then the step computes the next one.
        """
        if max(sequence.states_start, sequence.head_lengths[0]) >= sequence.num_computed_tokens:
            return 0
        return min(num_heads, sequence.max_new_tokens_left - 1)

    def draft(
        self, sequences: list[RequestState], num_drafts: list[int], shape: PassShape | None = None
    ) -> tuple[tuple[HeadInput, ...], int]:
        """The passes for the next drafts, as many of each sequence as `num_drafts` says.

        Args:
            shape: Sizes to which the passes are padded if all of them fit.

        Returns:
            The passes, and the columns of the drafts (`DraftInput.width`).
        """
        members, works = [], []
        for head in range(max(num_drafts)):
            ready = [number for number, count in enumerate(num_drafts) if count > head]
            work: list[_Work] = []
            for sequence in (sequences[n] for n in ready):
                start, stop = max(sequence.head_lengths[head], sequence.states_start), sequence.num_computed_tokens
                work.append((sequence, start, stop))
                sequence.head_lengths[head] = max(stop - head, 0)
            members.append(ready)
            works.append(work)
        if shape is not None and not all(_fits(work, shape) for work in works):
            shape = None
        width = len(sequences) if shape is None else shape.num_sequences + 1
        heads = []
        for head, (ready, work) in enumerate(zip(members, works, strict=True)):
            places = [place for sequence, start, stop in work for place in self._places(sequence, start, stop)]
            buffers = self._decode_buffers[head]
            heads.append(self._head_input(buffers, head, work, places, ready, width, shape))
        self.forget_old_states(sequences)
        return tuple(heads), width

    def forget_old_states(self, sequences: list[RequestState]) -> None:
        """Advances `states_start` to the first state that the last head, which lags most, still reads."""
        for sequence in sequences:
            sequence.states_start = max(sequence.states_start, sequence.num_computed_tokens - self.num_drafts)

    def state_places(self, spans: list[Span], buffers: StepBuffers) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the worker keeps the states of a pass of `buffers`, and which rows of the pass it keeps (None: all).

        Of a sequence with many new positions only the newest states, as many as the ring holds, can still be read.
        """
        places: list[int] = []
        rows: list[int] = []
        first_row = 0
        for span in spans:
            count = min(span.stop - span.start, self._ring_positions)
            offset = span.pages.seat * self._ring_positions
            places += [offset + p % self._ring_positions for p in range(span.stop - count, span.stop)]
            first_row += span.stop - span.start
            rows += range(first_row - count, first_row)
        places_T = buffers.values("state_places", places)
        return places_T, None if len(rows) == first_row else buffers.values("state_rows", rows)

    def _places(self, sequence: RequestState, start: int, stop: int) -> list[int]:
        offset = sequence.held_pages.seat * self._ring_positions
        return [offset + position % self._ring_positions for position in range(start, stop)]

    def _head_input(
        self,
        buffers: StepBuffers,
        head: int,
        work: list[_Work],
        places: list[int],
        members: "range | list[int]",
        width: int,
        shape: PassShape | None = None,
    ) -> HeadInput:
        """The pass of one head. `members` are the columns of its sequences among the `width` columns of the drafts."""
        spans: list[Span] = []
        tokens: list[int] = []
        last_rows: list[int] = []
        rows: list[int] = []
        sources: list[int] = []
        for member, (sequence, start, stop) in zip(members, work, strict=True):
            spans.append(Span(sequence.held_pages, start, stop))
            confirmed = sequence.tokens[start + 1 + head : stop + 1 + head]
            num_drafted = stop - start - len(confirmed)  # their tokens are drafts of earlier heads
            tokens += confirmed
            rows += range(len(tokens), len(tokens) + num_drafted)
            sources += (earlier * width + member for earlier in range(head - num_drafted, head))
            tokens += [0] * num_drafted
            last_rows.append(len(tokens) - 1)
        is_short, is_part = len(last_rows) == len(tokens), len(members) < width
        if shape is not None:
            is_short, is_part, members = False, True, list(members)
            for values, count, surplus in (
                (places, shape.num_tokens, 0),
                (rows, head * shape.num_sequences, shape.num_tokens - 1),
                (sources, head * shape.num_sequences, 0),
                (last_rows, shape.num_sequences, shape.num_tokens - 1),
                (members, shape.num_sequences, width - 1),
            ):
                values += [surplus] * (count - len(values))
        step = HeadInput(
            head,
            buffers.fill(spans, tokens, shape),
            state_places_T=buffers.values("state_places", places),
            draft_rows=buffers.values("draft_rows", rows) if rows else None,
            draft_sources=buffers.values("draft_sources", sources) if rows else None,
            last_rows_B=None if is_short else buffers.values("last_rows", last_rows),
            sequences_B=buffers.values("sequences", members) if is_part else None,
        )
        assert step.forward.shape == shape, "a pass that fits was not padded"
        buffers.send()
        return step


def _fits(work: list[_Work], shape: PassShape) -> bool:
    """Whether a pass leaves a row of a padded pass free, and all its positions have pages."""
    longest = max(stop - start for _, start, stop in work)
    is_whole = all(start >= sequence.held_pages.whole_from for sequence, start, _ in work)
    return (
        is_whole and longest <= shape.longest_query and sum(stop - start for _, start, stop in work) < shape.num_tokens
    )


_SMOOTHING = 0.1
_SLOWEST_LEARNING = 0.02
_STEPS_BETWEEN_TRIALS = 128
_STEPS_OF_A_TRIAL = 2
_FIRST_MEASUREMENTS = 3  # the fastest of these counts: the first steps may include one-time costs


class DraftLength:
    """The choice of one engine. With `adaptive=False` all heads always draft."""

    def __init__(self, num_heads: int, *, adaptive: bool):
        self._num_heads = num_heads
        self._adaptive = adaptive
        self._acceptance = [0.5] * num_heads
        self._num_judged = [0] * num_heads
        self._seconds: dict[int, list[float]] = {}
        self._num_measured: dict[int, list[int]] = {}
        self._steps = 0

    def choose(self, batch_size: int) -> int:
        """The number of heads that draft for the next step of `batch_size` sequences."""
        if not self._adaptive or not self._num_heads:
            return self._num_heads
        seconds, num_measured = self._measurements(batch_size)
        untried = [count for count, number in enumerate(num_measured) if number < _FIRST_MEASUREMENTS]
        if untried:
            return untried[-1]
        self._steps += 1
        best = max(range(self._num_heads + 1), key=lambda count: (self._tokens_per_step(count) / seconds[count], count))
        trial, step = divmod(self._steps, _STEPS_BETWEEN_TRIALS)
        if trial and step < _STEPS_OF_A_TRIAL:
            return min(best + 1, self._num_heads) if trial % 2 else max(best - 1, 0)
        return best

    def observe(self, batch_size: int, num_drafts: int, seconds: float) -> None:
        """Records the wall time of a step that verified `num_drafts` drafts per sequence and proposed as many."""
        averages, num_measured = self._measurements(batch_size)
        old = averages[num_drafts]
        if num_measured[num_drafts] < _FIRST_MEASUREMENTS:
            averages[num_drafts] = min(old, seconds)
        else:  # other processes may have delayed the step, so its time is capped at twice the average
            averages[num_drafts] += _SMOOTHING * (min(seconds, 2 * old) - old)
        num_measured[num_drafts] += 1

    def judge(self, num_offered: int, num_accepted: int) -> None:
        """Records one verification, in which the first `num_accepted` of `num_offered` drafts were accepted."""
        for head in range(min(num_accepted + 1, num_offered)):
            self._num_judged[head] += 1
            rate = max(1 / (self._num_judged[head] + 1), _SLOWEST_LEARNING)
            self._acceptance[head] += rate * ((head < num_accepted) - self._acceptance[head])

    def _tokens_per_step(self, count: int) -> float:
        tokens, chance = 1.0, 1.0
        for acceptance in self._acceptance[:count]:
            chance *= acceptance
            tokens += chance
        return tokens

    def _measurements(self, batch_size: int) -> tuple[list[float], list[int]]:
        """Seconds per step and number of measurements, each by the number of drafts."""
        size, counts = batch_size.bit_length(), self._num_heads + 1
        return self._seconds.setdefault(size, [math.inf] * counts), self._num_measured.setdefault(size, [0] * counts)
