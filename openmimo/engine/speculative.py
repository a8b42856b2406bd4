"""Speculative decoding with the model's own MTP heads (paper section 2.3 and table 10), exact.

Why it is exact. Each position's token is decided from the model's own distribution with that position's own random
number, as in plain decoding; a draft that equals it only means that the next position is already computed.
(In the terms of speculative sampling, arXiv 2211.17192: a draft d proposed with certainty is kept with probability
p(d), and otherwise the token follows p without d, rescaled.) What remains is rounding: a pass over several tokens may
differ from one over a single token in the last bits.

Positions. Head k at position i reads the main model's state at i and token i+1+k, and predicts token i+2+k. With n
confirmed tokens, the main layers have seen n-1, and the newest position is n-2: there head 0 reads the newest token,
head 1 the draft of head 0, and so on. For head k the last k positions thus read drafts. The next round computes these
positions again from real tokens, so no draft reads a row that came from another draft.

Here the host plans the passes of the heads; a `Worker` runs them.
"""

import torch

from openmimo.engine.request_state import RequestState
from openmimo.engine.step import HeadInput, Span, StepBuffers

_Work = tuple[RequestState, int, int]  # positions `start` to `stop` of a sequence


class DraftPlanner:
    """Plans the first heads of a model over the positions of several sequences at once.

    A head that was not needed for a while, or joins in the middle of a reused prefix, has no keys for the positions
    between: it continues with what its pages hold there. That can make its drafts worse until its window has passed,
    never the text.

    Args:
        buffers: One for each head, for its pass.
        keep_positions: How many positions a head remembers (None: all).
        ring_positions: As in `Worker`.
    """

    def __init__(
        self, buffers: list[StepBuffers], *, keep_positions: int | None, ring_positions: int, device: torch.device
    ):
        self.num_drafts = len(buffers)
        self._buffers = buffers
        self._keep_positions = keep_positions
        self._ring_positions = ring_positions
        self._device = device

    def follow_prompt(self, prefills: list[tuple[RequestState, int]]) -> tuple[HeadInput, ...]:
        """Brings the heads up to the positions of prompts whose tokens are known, where drafts will still see them.

        prefills: sequences, and the position up to which the main layers read each in the same step.
        """
        heads = []
        for head in range(self.num_drafts):
            work, places, first_row = [], [], 0
            for sequence, read in prefills:
                known = len(sequence.tokens) - 1 - head
                stop = min(read, known)
                if self._keep_positions is not None:
                    unseen = known - self._keep_positions - self.num_drafts
                    sequence.head_lengths[head] = max(sequence.head_lengths[head], min(unseen, stop))
                # After a prefix hit, states of earlier positions were never computed: the head skips them.
                start = max(sequence.head_lengths[head], sequence.states_start)
                if stop > start:
                    work.append((sequence, start, stop))
                    places += self._places(sequence, start, min(stop, sequence.num_computed_tokens))
                    begin = max(start, sequence.num_computed_tokens) - sequence.num_computed_tokens
                    places += [-1 - first_row - row for row in range(begin, stop - sequence.num_computed_tokens)]
                    sequence.head_lengths[head] = stop
                first_row += read - sequence.num_computed_tokens
            if work:
                heads.append(self._head_input(head, work, places, range(len(work))))
        return tuple(heads)

    def draft(self, sequences: list[RequestState], num_drafts: int) -> list[HeadInput]:
        """The passes for the next drafts of each sequence, at most one fewer than it has room for (a step adds one)."""
        heads = []
        for head in range(num_drafts):
            ready = [n for n, sequence in enumerate(sequences) if sequence.max_new_tokens_left > head + 1]
            if not ready:
                break
            work, places = [], []
            for sequence in (sequences[n] for n in ready):
                start, stop = max(sequence.head_lengths[head], sequence.states_start), sequence.num_computed_tokens
                work.append((sequence, start, stop))
                places += self._places(sequence, start, stop)
                sequence.head_lengths[head] = max(stop - head, 0)
            heads.append(self._head_input(head, work, places, ready))
        return heads

    def forget_old_states(self, sequences: list[RequestState]) -> None:
        """Keeps what the last head, which lags most, still has to read."""
        for sequence in sequences:
            sequence.states_start = max(sequence.states_start, sequence.num_computed_tokens - self.num_drafts)

    def state_places(self, spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the states of a pass are kept, and which of its rows: of a long run only the newest can be needed."""
        places, rows, first_row = [], [], 0
        for span in spans:
            count = min(span.stop - span.start, self._ring_positions)
            offset = span.pages.seat * self._ring_positions
            places += [offset + p % self._ring_positions for p in range(span.stop - count, span.stop)]
            first_row += span.stop - span.start
            rows += range(first_row - count, first_row)
        places_T = torch.tensor(places, device=self._device)
        return places_T, None if len(rows) == first_row else torch.tensor(rows, device=self._device)

    def _places(self, sequence: RequestState, start: int, stop: int) -> list[int]:
        offset = sequence.pages.seat * self._ring_positions
        return [offset + position % self._ring_positions for position in range(start, stop)]

    def _head_input(self, head: int, work: list[_Work], places: list[int], members: "range | list[int]") -> HeadInput:
        """The pass of one head; `members` says which sequences of the drafting these are."""
        spans, tokens, last_rows, rows, heads, columns = [], [], [], [], [], []
        for member, (sequence, start, stop) in zip(members, work, strict=True):
            spans.append(Span(sequence.pages, start, stop))
            confirmed = sequence.tokens[start + 1 + head : stop + 1 + head]
            num_drafted = stop - start - len(confirmed)  # tokens that are drafts of the heads before this one
            tokens += confirmed
            rows += range(len(tokens), len(tokens) + num_drafted)
            heads += range(head - num_drafted, head)
            columns += [member] * num_drafted
            tokens += [0] * num_drafted
            last_rows.append(len(tokens) - 1)
        forward = self._buffers[head].fill(spans, tokens)

        def ids(values: "range | list[int]") -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self._device)

        drafted = (ids(rows), ids(heads), ids(columns)) if rows else (None, None, None)
        return HeadInput(head, forward, ids(places), *drafted, ids(last_rows), ids(members))
