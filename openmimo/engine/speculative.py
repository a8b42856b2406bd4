"""Speculative decoding with the model's own MTP heads (paper section 2.3 and table 10), exact.

Why it is exact. Each position's token is decided from the model's own distribution with that position's own random
number, as in plain decoding; a draft that equals it only means that the next position is already computed.
(In the terms of speculative sampling, arXiv 2211.17192: a draft d proposed with certainty is kept with probability
p(d), and otherwise the token follows p without d, rescaled.) What remains is rounding: a pass over several tokens may
differ from one over a single token in the last bits.

Slots. Head k at slot i reads the main model's state at i and token i+1+k, and predicts token i+2+k. With n confirmed
tokens, the main layers have seen n-1, and the newest slot is n-2: there head 0 reads the newest token, head 1 the
draft of head 0, and so on. For head k the last k slots thus read drafts. The next round computes these slots again from
real tokens, so no draft reads a row that came from another draft.

T packed slots, D model dim.
"""

import torch

from openmimo.engine.cache import PageArena
from openmimo.engine.context import PagedContext, RotaryRows, Span
from openmimo.engine.request_state import RequestState
from openmimo.model.attention import kv_spec
from openmimo.model.backbone import Hidden
from openmimo.model.mimo import MiMo


def count_accepted(drafts: list[int], tokens: list[int]) -> int:
    """How many drafts, from the first on, are what the model decided at their positions."""
    for index, draft in enumerate(drafts):
        if draft != tokens[index]:
            return index
    return len(drafts)


class Drafter:
    """Runs the first heads of a model over the slots of several sequences at once.

    A head that was not needed for a while, or joins in the middle of a reused prefix, has no rows for the slots
    between: it goes on with what its pages hold there. That can make its drafts worse until its window has passed,
    never the text.
    """

    def __init__(self, model: MiMo, arena: PageArena, num_drafts: int, rotary: RotaryRows):
        self.num_drafts = num_drafts
        self._model = model
        self._arena = arena
        self._rotary = rotary
        self._first_head_layer = len(model.config.layers)
        self._reads_pre_norm = model.config.mtp.hidden == "pre_norm"
        self._keep_positions = kv_spec(model.config.mtp.attention).keep_positions

    def observe(self, sequence: RequestState, hidden: Hidden, rows: slice) -> None:
        """Adds the main-model states of a sequence's newest computed slots, rows of the last pass."""
        states_TD = (hidden.pre_norm_TD if self._reads_pre_norm else hidden.post_norm_TD)[rows]
        known = sequence.states_TD
        sequence.states_TD = states_TD if known is None else torch.cat([known, states_TD])

    def follow_prompt(self, sequences: list[RequestState]) -> None:
        """Prefill: brings the heads up to the slots whose tokens are known, where their drafts will still see them."""
        for head in range(self.num_drafts):
            work = []
            for sequence in sequences:
                known = len(sequence.tokens) - 1 - head
                stop = min(sequence.computed, known)
                if self._keep_positions is not None:
                    unseen = known - self._keep_positions - self.num_drafts
                    sequence.head_lengths[head] = max(sequence.head_lengths[head], min(unseen, stop))
                # After a prefix hit, states of earlier slots were never computed: the head does without these slots.
                if stop > max(sequence.head_lengths[head], _oldest_state(sequence)):
                    work.append((sequence, stop))
            if work:
                self._run_head(head, work)
        self.forget_old_states(sequences)

    def draft(self, sequences: list[RequestState], num_drafts: int) -> None:
        """Gives each sequence its next drafts, at most one fewer than it has room for (a step adds one token more)."""
        for head in range(num_drafts):
            ready = [sequence for sequence in sequences if sequence.room > head + 1]
            if not ready:
                break
            states_TD = self._run_head(head, [(sequence, sequence.computed) for sequence in ready])
            tokens = self._model.head(states_TD).argmax(dim=-1).tolist()
            for sequence, token in zip(ready, tokens, strict=True):
                sequence.drafts.append(token)
                sequence.head_lengths[head] = max(sequence.computed - head, 0)
        self.forget_old_states(sequences)

    def forget_old_states(self, sequences: list[RequestState]) -> None:
        """Keeps what the last head, which lags most, still has to read. A copy, to let go of the pass it came from."""
        for sequence in sequences:
            sequence.states_TD = sequence.states_TD[-self.num_drafts :].clone()

    def _run_head(self, head: int, work: list[tuple[RequestState, int]]) -> torch.Tensor:
        """Runs a head up to slot `stop` (exclusive) of each sequence; states [len(work), D] at the last."""
        spans, tokens, states = [], [], []
        for sequence, stop in work:
            oldest = _oldest_state(sequence)
            start = max(sequence.head_lengths[head], oldest)
            spans.append(Span(sequence.pages, start, stop))
            tokens += _tokens_between(sequence, start + 1 + head, stop + 1 + head)
            states.append(sequence.states_TD[start - oldest : stop - oldest])
            sequence.head_lengths[head] = stop
        states_TD = states[0] if len(states) == 1 else torch.cat(states)
        # The states were picked in `observe`, so both names mean the same here.
        hidden = Hidden(pre_norm_TD=states_TD, post_norm_TD=states_TD)
        context = PagedContext(self._arena, spans, rotary=self._rotary)
        out_TD = self._model.mtp(head, hidden, torch.tensor(tokens, device=states_TD.device), context)
        if len(out_TD) == len(spans):
            return out_TD
        last_rows = torch.tensor([span.stop - span.start for span in spans]).cumsum(0) - 1
        return out_TD[last_rows.to(out_TD.device)]


def _oldest_state(sequence: RequestState) -> int:
    """The first slot whose main-model state is still held."""
    return sequence.computed - sequence.states_TD.shape[0]


def _tokens_between(sequence: RequestState, start: int, stop: int) -> list[int]:
    """Tokens `start` to `stop` of the sequence with its drafts appended."""
    num_confirmed = len(sequence.tokens)
    return sequence.tokens[start:stop] + sequence.drafts[max(start - num_confirmed, 0) : max(stop - num_confirmed, 0)]
