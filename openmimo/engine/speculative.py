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

How many drafts. `DraftPolicy` chooses the number of drafts of each sequence in each step, so that a step gives the most
tokens per second. With a chance a_h that the draft of head h is right if those before it are, k drafts of a sequence
add a_0 + a_0 a_1 + ... + a_0...a_(k-1) tokens. These terms fall, so the best n drafts of a batch are the n largest
terms of all its sequences: the marginal gains, sorted. The time of a step depends on the number of heads that draft,
which is the shape of its graphs, and on n. So one sort finds the optimum exactly.

`StepTimes` predicts the times from measured steps. The chances of a sequence are those of its own drafts, with those
of all sequences as a prior; both forget. The choice changes speed only: the text is the same with any drafts.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from openmimo.engine.request_state import RequestState
from openmimo.engine.step import HeadInput, PassShape, Span, StepBuffers, padded_batch
from openmimo.model.config import ModelConfig, active_matmul_parameters, mtp_matmul_parameters

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


_FIRST_MEASUREMENTS = 3  # the fastest of these counts: the first steps may include one-time costs
_LEAST_RATE, _MOST_RATE = 0.05, 0.25  # of averages: of a shape in use, and of one that was not used for long
_STEPS_OF_MEMORY = 64
_MOST_CHANGE = 1.2  # of one step
_COMMON_RATE = 0.02  # what slows one shape slows the others: longer texts, other processes
_READING_ROWS = 10  # rows whose arithmetic takes as long as reading the weights, before any measurement
_PRIOR_SLOPE, _SLOPE_WEIGHT, _SLOPE_KEPT = 0.5, 0.02, 0.99
_UNTRIED_DISCOUNT = 0.5


class StepCost(NamedTuple):
    """What a step reads and multiplies, in parameters: the shape of its cost before any step is measured.

    Attributes:
        shared: Parameters of the main layers and the output head that every row multiplies.
        experts: Parameters of all routed experts.
        hit_share: Share of the routed experts that one row multiplies.
        head: Parameters of one drafting head, with its pass through the output head.
    """

    shared: float
    experts: float
    hit_share: float
    head: float

    def main(self, num_rows: int) -> np.ndarray:
        """The cost of the main layers by the number of rows, from 0 to `num_rows`.

        A row adds its products, and the experts that no earlier row has read: E (1 - (1 - A / E)^R) of E experts are
        read by R rows of A each, if routes are independent.
        """
        rows_R = np.arange(num_rows + 1)
        read_R = self.shared + self.experts * (1.0 - (1.0 - self.hit_share) ** rows_R)
        return read_R + rows_R * (self.shared + self.experts * self.hit_share) / _READING_ROWS

    def heads(self, num_heads: int, num_sequences: int) -> float:
        """The cost of the passes of drafting heads."""
        return num_heads * self.head * (1.0 + num_sequences / _READING_ROWS)


def step_cost(config: ModelConfig) -> StepCost:
    """The cost of the steps of a model, from its sizes."""
    active, experts, hit_share = float(active_matmul_parameters(config)), 0.0, 0.0
    if config.moe is not None:
        num_sparse = sum(layer.ffn == "moe" for layer in config.layers)
        experts = 3.0 * config.hidden_size * config.moe.expert_dim * config.moe.num_experts * num_sparse
        hit_share = config.moe.experts_per_token / config.moe.num_experts
    num_heads = max(config.num_mtp_heads, 1)
    return StepCost(active - experts * hit_share, experts, hit_share, mtp_matmul_parameters(config) / num_heads)


class _ShapeTimes:
    """Measured steps of one size of batch, by the number of heads that draft."""

    def __init__(self, num_heads: int):
        self.seconds = [math.inf] * (num_heads + 1)
        self.cost = [0.0] * (num_heads + 1)  # the mean of `StepCost` in these steps
        self.num_measured = [0] * (num_heads + 1)
        self.last_step = [0] * (num_heads + 1)
        self.covariance = self.variance = 0.0

    @property
    def slope(self) -> float:
        """By how many percent a step is longer in which `StepCost` is one percent higher, with as many heads."""
        slope = (self.covariance + _PRIOR_SLOPE * _SLOPE_WEIGHT) / (self.variance + _SLOPE_WEIGHT)
        return min(max(slope, 0.0), 2.0)

    def knows(self, num_heads: int) -> bool:
        """Whether enough steps with this number of heads were measured."""
        return self.num_measured[num_heads] >= _FIRST_MEASUREMENTS


class StepTimes:
    """Predicts the time of a step from measured steps of the same captured shape.

    A shape is a size of batch and a number of drafting heads. Within a shape the time depends on the verified rows, in
    proportion to `StepCost` times a measured slope. A shape that was not measured has the ratio to another one of its
    batch size that `StepCost` gives.
    """

    def __init__(self, cost: StepCost, num_heads: int):
        self._cost, self._num_heads = cost, num_heads
        self._main = cost.main(0)
        self._sizes: dict[int, _ShapeTimes] = {}
        self._num_steps = 0

    def knows(self, num_sequences: int, num_heads: int) -> bool:
        """Whether enough steps of this shape were measured."""
        return self._of(num_sequences).knows(num_heads)

    def least_recent(self, num_sequences: int) -> tuple[int, int]:
        """The number of heads whose time is oldest, and its age in steps."""
        last = self._of(num_sequences).last_step
        oldest = min(range(self._num_heads + 1), key=last.__getitem__)
        return oldest, self._num_steps - last[oldest]

    def seconds(self, num_sequences: int) -> np.ndarray:
        """Seconds of a step by the number of heads that draft and the number of drafts, [heads + 1, drafts + 1]."""
        times, most = self._of(num_sequences), num_sequences * (1 + self._num_heads)
        main_N = self._main_costs(most)[num_sequences : most + 1]
        bases, slopes = [], []
        for heads in range(self._num_heads + 1):
            base, cost, slope = self._mean(times, num_sequences, heads)
            per_cost = base * slope / cost
            bases.append(base - base * slope + per_cost * self._cost.heads(heads, num_sequences))
            slopes.append(per_cost)
        return np.array(bases)[:, None] + np.array(slopes)[:, None] * main_N

    def predict(self, num_sequences: int, num_heads: int, num_drafts: int) -> float:
        """Seconds of one step."""
        mean, cost, slope = self._mean(self._of(num_sequences), num_sequences, num_heads)
        return mean * (1.0 + slope * (self._cost_of(num_sequences, num_heads, num_drafts) / cost - 1.0))

    def observe(self, num_sequences: int, num_heads: int, num_drafts: int, seconds: float) -> None:
        """Records the time of a step in which `num_heads` heads made `num_drafts` drafts."""
        self._num_steps += 1
        times, cost = self._of(num_sequences), self._cost_of(num_sequences, num_heads, num_drafts)
        age = self._num_steps - times.last_step[num_heads]
        times.last_step[num_heads] = self._num_steps
        if not times.knows(num_heads):
            times.num_measured[num_heads] += 1
            if seconds < times.seconds[num_heads]:
                times.seconds[num_heads], times.cost[num_heads] = seconds, cost
            return
        predicted = self.predict(num_sequences, num_heads, num_drafts)
        ratio = min(max(seconds / predicted, 1.0 / _MOST_CHANGE), _MOST_CHANGE)  # a step may have been delayed
        rate = min(max(age / _STEPS_OF_MEMORY, _LEAST_RATE), _MOST_RATE)
        mean_seconds, mean_cost = times.seconds[num_heads], times.cost[num_heads]
        more_cost = cost / mean_cost - 1.0
        more_seconds = ratio * predicted / mean_seconds - 1.0
        times.variance = _SLOPE_KEPT * times.variance + more_cost * more_cost
        times.covariance = _SLOPE_KEPT * times.covariance + more_cost * more_seconds
        times.seconds[num_heads] = mean_seconds * (1.0 + rate * more_seconds)
        times.cost[num_heads] = mean_cost * (1.0 + rate * more_cost)
        for heads in range(self._num_heads + 1):
            if heads != num_heads and times.knows(heads):
                times.seconds[heads] *= 1.0 + _COMMON_RATE * (ratio - 1.0)

    def _mean(self, times: _ShapeTimes, num_sequences: int, num_heads: int) -> tuple[float, float, float]:
        """Seconds and `StepCost` of a mean step of a shape, and the slope around it."""
        if times.knows(num_heads):
            return times.seconds[num_heads], times.cost[num_heads], times.slope
        known = next((heads for heads in range(self._num_heads + 1) if times.knows(heads)), None)
        cost = self._cost_of(num_sequences, num_heads, num_heads * num_sequences)
        if known is None:
            return cost, cost, 1.0
        # A discount, so that what the sizes of the model make look expensive is tried as well.
        return times.seconds[known] * (1.0 + _UNTRIED_DISCOUNT * (cost / times.cost[known] - 1.0)), cost, times.slope

    def _cost_of(self, num_sequences: int, num_heads: int, num_drafts: int) -> float:
        main = self._main_costs(num_sequences + num_drafts)[num_sequences + num_drafts]
        return float(main) + self._cost.heads(num_heads, num_sequences)

    def _main_costs(self, most: int) -> np.ndarray:
        if len(self._main) <= most:
            self._main = self._cost.main(2 * most)
        return self._main

    def _of(self, num_sequences: int) -> _ShapeTimes:
        size = padded_batch(num_sequences)
        if size not in self._sizes:
            self._sizes[size] = _ShapeTimes(self._num_heads)
        return self._sizes[size]


def allocate(gains_BH: np.ndarray, seconds_HN: np.ndarray) -> np.ndarray:
    """The number of drafts of each sequence that gives the most tokens per second, int64 [B].

    Args:
        gains_BH: Tokens that the next draft of each sequence adds, by the drafts before it. They do not rise along a
            row; a draft that may not be made has a gain of 0.
        seconds_HN: Seconds of a step by the number of heads that draft and the number of drafts, [H + 1, B H + 1].
    """
    B, H = gains_BH.shape
    gains_N = gains_BH.T.ravel()
    order_N = (-gains_N).argsort(kind="stable")  # of equal gains, the earlier head comes first
    sorted_N = gains_N[order_N]
    sorted_N = sorted_N[: int(np.count_nonzero(sorted_N))]
    if not len(sorted_N):
        return np.zeros(B, dtype=np.int64)
    is_used_HN = order_N[: len(sorted_N)] < B * np.arange(1, H + 1)[:, None]  # by the first 1, 2, ... heads
    num_HN = is_used_HN.cumsum(axis=1)
    tokens_HN = (is_used_HN * sorted_N).cumsum(axis=1) + B
    times_HN = seconds_HN.take(num_HN + seconds_HN.shape[1] * np.arange(1, H + 1)[:, None])
    heads, last = divmod(int((tokens_HN / times_HN).argmax()), len(sorted_N))
    if tokens_HN[heads, last] * seconds_HN[0, 0] <= B * times_HN[heads, last]:
        return np.zeros(B, dtype=np.int64)
    return np.bincount(order_N[: last + 1][is_used_HN[heads, : last + 1]] % B, minlength=B)


_FIRST_RIGHT, _FIRST_WRONG = 1.4, 0.6  # drafts of each head that are assumed of all sequences before any is judged
_COMMON_WEIGHT = 6.0  # drafts of its own after which a sequence counts as much as all others
_RATIO_WEIGHT = 2.0
_OPTIMISM = 0.4  # drafts of a sequence that are assumed to be right, so that unknown ones are tried
_KEPT = 0.96  # of what a sequence's drafts have shown, after each step
_COMMON_KEPT = 0.99  # the same of all sequences
_MOST_WRONG = 0.98
_STEPS_BETWEEN_TRIALS = 256
_STEPS_OF_REST = 8
_STEPS_OF_TIMES = 8
_ALLOWED_LOSS = 0.01  # of the time of plain decoding, in the long run
_MOST_CREDIT, _CREDIT_TO_START, _MOST_LOSS_OF_A_STEP = 4.0, 2.0, 2.0  # plain steps


class DraftPolicy:
    """Chooses the drafts of each sequence of an engine. With `adaptive=False` all heads always draft.

    Chances of unknown drafts are overestimated and times of untried shapes are underestimated, so the policy tries what
    may pay. It keeps an account of the time that drafts have saved and cost against plain steps. An overdrawn account
    means plain steps, which add one percent of their time to it. So drafts that do not pay cost one percent.

    Args:
        num_heads: Heads that may draft.
        adaptive: Whether there is a choice.
        cost: The cost of steps before any is measured.
    """

    def __init__(self, num_heads: int, *, adaptive: bool, cost: StepCost):
        self.times = StepTimes(cost, num_heads)
        self._num_heads, self._is_adaptive = num_heads, adaptive and num_heads > 0
        self._heads_H = np.arange(num_heads)
        self._judged_X2H = np.zeros((0, 2, num_heads))  # drafts of each seat that were right, and that were wrong
        self._common_2H = np.zeros((2, num_heads))
        self._owners_X = np.full(0, -1)
        self._seats: list[int] = []
        self._owners: list[int] = []
        self._seats_B = np.zeros(0, dtype=np.int64)
        self._num_plain = 0  # steps without drafts since the last with some
        self._seconds: tuple[int, np.ndarray] | None = None
        self._age_of_seconds = 0
        self._credit = _MOST_CREDIT
        self._may_draft = True
        self._rest = self._resting_size = 0
        self._again: list[int] | None = None  # the last choice, until the step after it has taken it as well

    def choose(self, seats: list[int], owners: list[int], limits: list[int]) -> list[int]:
        """The number of drafts of each sequence in the next step. Every second step of one batch repeats a choice.

        Args:
            seats: The seat of each sequence, by which the policy keeps what it learns.
            owners: A number of each sequence, to recognize a seat that has passed to another.
            limits: The most drafts of each.
        """
        if not self._is_adaptive:
            return limits
        num_sequences = len(limits)
        again, self._again = self._again, None
        if again is not None and seats == self._seats and owners == self._owners:
            return [min(count, limit) for count, limit in zip(again, limits, strict=True)]
        if self._rest and num_sequences == self._resting_size:
            self._rest -= 1
            return [0] * num_sequences
        if not self._allows() or not self.times.knows(num_sequences, 0):
            return [0] * num_sequences
        oldest, age = self.times.least_recent(num_sequences)
        if age > _STEPS_BETWEEN_TRIALS:
            return [min(limit, oldest) for limit in limits]
        gains_BH = self.chances(seats, owners).cumprod(axis=1)
        if min(limits) < self._num_heads:
            gains_BH[self._heads_H >= np.array(limits)[:, None]] = 0.0
        counts = allocate(gains_BH, self._recent_seconds(num_sequences)).tolist()
        if not any(counts):
            self._rest, self._resting_size = _STEPS_OF_REST, num_sequences
        else:
            self._again = counts
        return counts

    def chances(self, seats: list[int], owners: list[int]) -> np.ndarray:
        """The chance of each draft to be right if those before it are, float64 [B, H]. Arguments as in `choose`.

        A sequence's drafts are judged by all heads together: if as many again were wrong as among all sequences, each
        head is expected to be wrong twice as often. Its drafts of one head then correct this for the head.
        """
        self._meet(seats, owners)
        right_H, wrong_H = self._common_2H
        wrong_H = (wrong_H + _FIRST_WRONG) / (right_H + wrong_H + (_FIRST_RIGHT + _FIRST_WRONG))
        judged_B2H = self._judged_X2H[self._seats_B]
        right_BH, wrong_BH = judged_B2H[:, 0], judged_B2H[:, 1]
        judged_BH = right_BH + wrong_BH
        ratio_B = (wrong_BH.sum(axis=1) + _RATIO_WEIGHT) / (judged_BH @ wrong_H + _RATIO_WEIGHT)
        expected_BH = np.minimum(ratio_B[:, None] * wrong_H, _MOST_WRONG)
        chances_BH = (right_BH + (_COMMON_WEIGHT + _OPTIMISM) - _COMMON_WEIGHT * expected_BH) / (
            judged_BH + _COMMON_WEIGHT
        )
        return np.minimum(chances_BH, 1.0)

    def judge(self, seats: list[int], owners: list[int], offered: list[int], accepted: list[int]) -> None:
        """Records a verification, in which the first `accepted` of `offered` drafts of each sequence were right."""
        if not self._is_adaptive:
            return
        self._num_plain += 1
        if not any(offered):
            return
        self._meet(seats, owners)
        num_right_B1 = np.array(accepted)[:, None]
        right_BH = self._heads_H < num_right_B1
        wrong_BH = (self._heads_H == num_right_B1) & (num_right_B1 < np.array(offered)[:, None])
        new_B2H = np.stack((right_BH, wrong_BH), axis=1)
        self._judged_X2H *= _KEPT**self._num_plain
        self._judged_X2H[self._seats_B] += new_B2H
        self._common_2H *= _COMMON_KEPT**self._num_plain
        self._common_2H += new_B2H.sum(axis=0)
        self._num_plain = 0

    def observe(self, counts: list[int], num_tokens: int, seconds: float) -> None:
        """Records the time of a step with these drafts of each sequence, and the tokens that it added."""
        if not self._is_adaptive:
            return
        num_sequences, num_heads, num_drafts = len(counts), max(counts), sum(counts)
        self.times.observe(num_sequences, num_heads, num_drafts, seconds)
        saved = 0.0
        if num_heads:
            longer = self.times.predict(num_sequences, num_heads, num_drafts) / self.times.predict(num_sequences, 0, 0)
            saved = max(num_tokens / num_sequences - longer, -_MOST_LOSS_OF_A_STEP)
        self._credit = min(self._credit + saved + _ALLOWED_LOSS, _MOST_CREDIT)

    def _allows(self) -> bool:
        """Whether the account allows drafts: once it is overdrawn, not before it has the credit to start."""
        if self._credit <= 0.0 or self._credit >= _CREDIT_TO_START:
            self._may_draft = self._credit > 0.0
        return self._may_draft

    def _recent_seconds(self, num_sequences: int) -> np.ndarray:
        """`StepTimes.seconds`, as it was at most a few steps ago."""
        self._age_of_seconds += 1
        if self._seconds is None or self._seconds[0] != num_sequences or self._age_of_seconds > _STEPS_OF_TIMES:
            self._seconds, self._age_of_seconds = (num_sequences, self.times.seconds(num_sequences)), 0
        return self._seconds[1]

    def _meet(self, seats: list[int], owners: list[int]) -> None:
        """Makes these the seats of the batch, and forgets what is known of those that have passed to others."""
        if seats == self._seats and owners == self._owners:
            return
        seats_B, owners_B = np.array(seats), np.array(owners)
        self._seats, self._owners, self._seats_B = list(seats), list(owners), seats_B
        num_missing = int(seats_B.max()) + 1 - len(self._owners_X)
        if num_missing > 0:
            num_new = num_missing + len(self._owners_X)
            self._owners_X = np.concatenate([self._owners_X, np.full(num_new, -1)])
            self._judged_X2H = np.concatenate([self._judged_X2H, np.zeros((num_new, 2, self._num_heads))])
        is_new_B = self._owners_X[seats_B] != owners_B
        self._owners_X[seats_B] = owners_B
        self._judged_X2H[seats_B[is_new_B]] = 0.0
