"""Scheduling: which requests run in the next step, and how many tokens of each. No tensors here.

    add                 admit                          decode, prefill                 finished
    ----->  waiting  ----------->  running (sorted) -------------------> next step  ------------->
            (sorted) <-----------
                        preempt

Selection. Every step decodes all running sequences whose prompt is read, and reads prompts within a token budget. The
budget goes to prompts in order, but a prompt longer than the budget gets only an even share of it. So a long prompt
delays neither the tokens nor the short prompts of other requests.

Admission. Requests are admitted by priority, then in order of arrival, once the cache has room for their prompt and the
next drafts. The first in the queue blocks those after it, so a large request is not overtaken forever. A try matches
the prompt against the prefix tree and counts the pages of the running requests. So a request that does not fit is tried
again when another ends, and otherwise after 8, 16, 32, ... steps: tries grow with the logarithm of the steps only.

Preemption. When the cache is full, memory that no running request needs is freed first: prefixes, then idle sessions,
then the pages of session turns that wait. Then the last running request in the same order is preempted: it releases its
pages, keeps its tokens, and waits to be read again. The first in the order can always continue, so no request starves.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from openmimo.engine.cache import PageArena, PageTables
from openmimo.engine.config import EngineConfig
from openmimo.engine.prefix import PrefixCache
from openmimo.engine.request_state import RequestState
from openmimo.engine.step import PROMPTS

_SPARED_SHARE = 8  # 1/8 of the arena is not given to positions that only a later request could read
_FIRST_WAIT = 8  # steps from the first to the second try to admit a request that does not fit


@dataclass
class Plan:
    """The work of one step.

    Attributes:
        decodes: Sequences that decode.
        prefills: Sequences whose prompts are read, each with the position at which the step stops.
    """

    decodes: list[RequestState] = field(default_factory=list)
    prefills: list[tuple[RequestState, int]] = field(default_factory=list)


def sort_key(sequence: RequestState) -> tuple[int, int]:
    """The order of service: by priority, then by arrival."""
    return (sequence.request.priority, sequence.arrival)


class Scheduler:
    """The waiting and the running sequences of one engine, each in order of `sort_key`.

    Args:
        prefix: The prefix cache; None if it is disabled.
        num_drafts: MTP heads that draft.
        on_cpu: Whether the engine runs on a CPU, for the default sizes of a step and the pages of prompts. Elsewhere a
            step reads at most 16 prompts, as a captured pass does.
        free_idle: Releases the pages of the least recently used idle session; returns whether there was one.
    """

    def __init__(
        self,
        arena: PageArena,
        prefix: PrefixCache | None,
        config: EngineConfig,
        *,
        num_drafts: int,
        on_cpu: bool = True,
        free_idle: Callable[[], bool],
    ):
        self.waiting: list[RequestState] = []
        self.running: list[RequestState] = []
        self.num_preemptions = 0
        self._arena = arena
        self._prefix = prefix
        self._max_sequences = config.max_sequences
        self._prompt_tokens, self._mixed_prompt_tokens = config.prompt_tokens(on_cpu=on_cpu)
        self._max_prompts = config.max_sequences if on_cpu else PROMPTS
        # An accelerator captures the pass over a prompt if each of its positions has a page.
        self._spares_pages = prefix is not None or not on_cpu
        self._margin = num_drafts
        self._free_idle = free_idle
        self._refused: RequestState | None = None
        self._steps_to_next_try = self._wait = 0

    def pages_at_most(self, max_length: int) -> int:
        """An upper bound on the pages that one sequence of `max_length` positions holds at any time."""
        kept = [group.spec.keep_positions for group in self._arena.layout.groups]
        while_read = sum(
            group.pages_until(keep + self._margin) + 2 * group.num_parts
            for group, keep in zip(self._arena.layout.groups, kept, strict=True)
            if keep is not None
        )
        return self._arena.pages_for(max_length, self._margin) + while_read

    def add(self, sequence: RequestState) -> None:
        """Adds a sequence to the queue."""
        bisect.insort(self.waiting, sequence, key=sort_key)

    def remove(self, sequence: RequestState) -> None:
        """Removes a waiting or running sequence, which keeps its pages."""
        self._refused = None
        (self.waiting if sequence in self.waiting else self.running).remove(sequence)

    def plan(self) -> Plan:
        """Plans the next step and takes its pages."""
        plan = Plan()
        self._admit()
        for sequence in list(self.running):
            if sequence.num_uncomputed_tokens != 1 or sequence.pages is None:  # without pages: preempted just now
                continue
            if not sequence.max_new_tokens_left:  # its last token is on its way to the host
                continue
            num_drafts = min(self._margin, sequence.max_new_tokens_left - 1)
            # A sequence may be longer by now, but not longer than it can become.
            longest = sequence.num_computed_tokens + sequence.num_possible_tokens + 1 + num_drafts
            if self._reach(sequence, min(longest, sequence.max_length)):
                plan.decodes.append(sequence)
        self._plan_prefills(plan)
        # A sequence that was planned first may have been preempted by one that comes earlier in the order.
        plan.decodes = [sequence for sequence in plan.decodes if sequence.pages is not None]
        plan.prefills = [(sequence, stop) for sequence, stop in plan.prefills if sequence.pages is not None]
        return plan

    def restart(self) -> None:
        """Preempts all running sequences. These and waiting session turns are read again from their first token."""
        for sequence in list(self.running):
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.forget_computed()

    def _plan_prefills(self, plan: Plan) -> None:
        """Divides the token budget: an even share to each long prompt, the rest to short prompts in order.

        A prompt is long if its unread tokens exceed the budget. A prompt also gets what no later one can use. With a
        budget of 100 tokens, four prompts and so an even share of 25:

            prompt    unread             planned
            A         1000    long       25    share
            B           30    short      30    whole: 100 - 25 (A) - 25 (kept for C) are left
            C          400    long       25    share
            D           20    short      20    the rest

        If there are more prompts than a step may read, it reads the first, so that each has its turn, and the shortest.
        """
        reading = [sequence for sequence in self.running if sequence.num_uncomputed_tokens > 1]
        if len(reading) > self._max_prompts:
            places = sorted(range(1, len(reading)), key=lambda place: reading[place].num_uncomputed_tokens)
            reading = [reading[place] for place in sorted([0, *places[: self._max_prompts - 1]])]
        budget = self._mixed_prompt_tokens if plan.decodes else self._prompt_tokens
        even_share, longest_short = max(budget // max(len(reading), 1), 1), budget
        unread_of = [sequence.num_uncomputed_tokens for sequence in reading]
        unread_later, num_long_later = sum(unread_of), sum(unread > longest_short for unread in unread_of)
        for sequence, unread in zip(reading, unread_of, strict=True):
            is_long = unread > longest_short
            unread_later -= unread
            num_long_later -= is_long
            limit = even_share if is_long else max(budget - even_share * num_long_later, even_share)
            count = min(unread, budget, max(limit, budget - unread_later))
            if count < 1 or sequence.pages is None:
                continue
            if self._reach(sequence, sequence.num_computed_tokens + count):
                plan.prefills.append((sequence, sequence.num_computed_tokens + count))
                budget -= count

    def _admit(self) -> None:
        """Moves sequences from the queue to the running ones as long as their pages can be freed.

        The first is always admitted if nothing runs: `Engine.check` ensures that it fits in the arena. Pages are taken
        later, in `_reach`, so a request needs room for its tokens, the next token and drafts, and one spare row.
        """
        while self.waiting and len(self.running) < self._max_sequences:
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
            if self.running and needed > self._arena.num_free and not self._can_free(needed, sequence):
                if sequence.request.session is None:
                    sequence.forget_computed()
                self._wait = 2 * self._wait if sequence is self._refused else _FIRST_WAIT
                self._refused, self._steps_to_next_try = sequence, self._wait
                return
            self._make_room(needed, sequence)
            del self.waiting[0]
            bisect.insort(self.running, sequence, key=sort_key)

    def _reach(self, sequence: RequestState, length: int) -> bool:
        """Takes the pages for `length` positions; returns False if the sequence itself had to be preempted."""
        if length <= sequence.held_pages.num_positions:
            return True
        missing = sequence.held_pages.missing(length)
        while missing > self._arena.num_free and not self._make_room(missing):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        spare = self._arena.num_free - missing - self._arena.num_pages // _SPARED_SHARE
        sequence.held_pages.reach(length, spare_pages=max(spare, 0) if self._spares_pages else 0)
        return True

    def _can_free(self, num_pages: int, admitted: RequestState) -> bool:
        """Whether `num_pages` pages are held neither by running requests nor by the one to admit."""
        is_held = np.zeros(self._arena.num_pages, dtype=bool)
        for sequence in (*self.running, admitted):
            sequence.held_pages.mark_held(is_held)
        return num_pages <= self._arena.num_pages - int(np.count_nonzero(is_held))

    def _make_room(self, num_pages: int, admitted: RequestState | None = None) -> bool:
        """Frees what neither running requests nor `admitted` need, until `num_pages` pages are free.

        Waiting session turns hold the pages of their earlier turns; the last in the queue loses them first. Returns
        whether that many pages are free.
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
