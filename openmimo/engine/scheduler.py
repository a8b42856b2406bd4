"""Which requests run in the next step, and how many tokens of each. No tensors here.

Every step serves all decoding sequences, and reads a bounded number of prompt tokens beside them: prompts in the order
of their requests, but one that a step cannot read whole takes only an even share. So a long prompt delays neither the
tokens of others nor their prompts, and short ones do not all end late. Requests are admitted by priority, then in order
of arrival, when the cache has room for their prompt. When the cache is full, what no running request needs goes first
(prefixes, idle sessions, what waiting turns of sessions hold); then the last in that same order is preempted: it gives
back its pages, keeps its tokens, and waits to be read again. The first in the order can thus always go on.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from openmimo.engine.cache import PageArena, PageTables
from openmimo.engine.config import EngineConfig
from openmimo.engine.prefix import PrefixCache
from openmimo.engine.request_state import RequestState

_SPARED_SHARE = 8  # this fraction of the arena is left free by positions that only a later request might use
_STEPS_BETWEEN_TRIES = 8  # of a request that the cache has no room for; matching its prompt costs time


@dataclass
class Plan:
    """One step. prefills: sequence and the position up to which its tokens are read."""

    decodes: list[RequestState] = field(default_factory=list)
    prefills: list[tuple[RequestState, int]] = field(default_factory=list)


def rank(sequence: RequestState) -> tuple[int, int]:
    """The order in which requests are served."""
    return (sequence.request.priority, sequence.arrival)


class Scheduler:
    """The waiting and the running sequences of one engine.

    prefix: None without reuse. free_idle: gives back the pages of the idle session that was used longest ago, and says
    whether there was one.
    """

    def __init__(
        self,
        arena: PageArena,
        prefix: PrefixCache | None,
        config: EngineConfig,
        *,
        num_drafts: int,
        free_idle: Callable[[], bool],
    ):
        self.waiting: list[RequestState] = []
        self.running: list[RequestState] = []
        self.num_preemptions = 0
        self._arena = arena
        self._prefix = prefix
        self._config = config
        self._margin = num_drafts
        self._free_idle = free_idle
        self._refused: RequestState | None = None
        self._steps_to_next_try = 0

    def pages_at_most(self, max_length: int) -> int:
        """Pages that a sequence of `max_length` may need at once, alone."""
        kept = [group.spec.keep_positions for group in self._arena.layout.groups]
        while_read = sum(
            group.pages_until(keep + self._margin) + 2 * group.num_parts
            for group, keep in zip(self._arena.layout.groups, kept, strict=True)
            if keep is not None
        )
        return self._arena.pages_for(max_length, self._margin) + while_read

    def add(self, sequence: RequestState) -> None:
        """Puts a sequence in its place among the waiting."""
        bisect.insort(self.waiting, sequence, key=rank)

    def remove(self, sequence: RequestState) -> None:
        """Takes out a sequence, wherever it is. Its pages stay its own."""
        self._refused = None
        (self.waiting if sequence in self.waiting else self.running).remove(sequence)

    def plan(self) -> Plan:
        """The next step. Pages for it are taken."""
        plan = Plan()
        self._admit()
        for sequence in list(self.running):
            is_decoding = sequence.num_uncomputed_tokens == 1 and sequence in self.running
            if is_decoding and self._reach(sequence, sequence.num_computed_tokens + 1 + len(sequence.drafts)):
                plan.decodes.append(sequence)
        self._plan_prefills(plan)
        # a sequence planned early may have been preempted for one of higher rank
        plan.decodes = [sequence for sequence in plan.decodes if sequence.pages is not None]
        plan.prefills = [(sequence, stop) for sequence, stop in plan.prefills if sequence.pages is not None]
        return plan

    def restart(self) -> None:
        """Preempts everything: all requests will be read from their first token, also turns of a session that wait."""
        for sequence in list(self.running):
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.forget_computed()

    def _plan_prefills(self, plan: Plan) -> None:
        """Long prompts, which no step can read whole, get an even share each, short ones what these leave, in order."""
        reading = [sequence for sequence in self.running if sequence.num_uncomputed_tokens > 1]
        budget = self._config.mixed_prefill_tokens if plan.decodes else self._config.prefill_tokens
        even_share, longest_short = max(budget // max(len(reading), 1), 1), budget
        for index, sequence in enumerate(reading):
            later = [other.num_uncomputed_tokens for other in reading[index + 1 :]]
            kept_for_long = even_share * sum(remaining > longest_short for remaining in later)
            is_long = sequence.num_uncomputed_tokens > longest_short
            most = even_share if is_long else max(budget - kept_for_long, even_share)
            count = min(sequence.num_uncomputed_tokens, budget, max(most, budget - sum(later)))
            if count < 1 or sequence.pages is None:
                continue
            if self._reach(sequence, sequence.num_computed_tokens + count):
                plan.prefills.append((sequence, sequence.num_computed_tokens + count))
                budget -= count

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._config.max_sequences:
            sequence = self.waiting[0]
            if self.running and sequence is self._refused and self._steps_to_next_try:
                self._steps_to_next_try -= 1
                return
            if sequence.pages is None:
                sequence.pages = PageTables(self._arena, self._margin)
                sequence.num_cached_tokens = 0
                if self._prefix is not None and sequence.request.session is None:
                    self._prefix.start(sequence)
            needed = sequence.pages.missing(len(sequence.tokens) + 1 + self._margin) + self._arena.layout.pages_per_row
            if self.running and needed > self._arena.num_free and not self._could_have(needed, sequence):
                if sequence.request.session is None:
                    sequence.forget_computed()
                self._refused, self._steps_to_next_try = sequence, _STEPS_BETWEEN_TRIES
                return
            self._make_room(needed, sequence)
            del self.waiting[0]
            bisect.insort(self.running, sequence, key=rank)

    def _reach(self, sequence: RequestState, length: int) -> bool:
        """Takes the pages for `length` positions; False if the sequence had to be preempted itself."""
        missing = sequence.pages.missing(length)
        while missing > self._arena.num_free and not self._make_room(missing):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        spare = self._arena.num_free - missing - self._arena.num_pages // _SPARED_SHARE
        sequence.pages.reach(length, spare_pages=max(spare, 0) if self._prefix is not None else 0)
        return True

    def _could_have(self, num_pages: int, admitted: RequestState) -> bool:
        """Whether so many pages are free, or would be if everything but the running requests gave theirs back."""
        is_held = np.zeros(self._arena.num_pages, dtype=bool)
        for sequence in (*self.running, admitted):
            sequence.pages.mark_held(is_held)
        return num_pages <= self._arena.num_pages - np.count_nonzero(is_held)

    def _make_room(self, num_pages: int, admitted: RequestState | None = None) -> bool:
        """Frees what no running request needs (nor the one that is to run), until so many pages are free or none is.

        Waiting turns hold what their session had computed; the last to be served loses it first.
        """
        if num_pages > self._arena.num_free and self._prefix is not None:
            self._prefix.evict(num_pages - self._arena.num_free)
        while num_pages > self._arena.num_free and self._free_idle():
            pass
        for sequence in reversed(self.waiting):
            if num_pages > self._arena.num_free and sequence is not admitted:
                sequence.forget_computed()
        return num_pages <= self._arena.num_free

    def _preempt(self, victim: RequestState) -> None:
        self.running.remove(victim)
        self._refused = None
        victim.forget_computed()
        self.add(victim)
        self.num_preemptions += 1
