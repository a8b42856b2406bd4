"""Runs the model for one step of a plan: a pass of decoding sequences, and a pass of prompts that are being read.

Plain decoding is the case of no drafts: a pass feeds each sequence's newest token and whatever drafts it has, decides a
token at every position, and keeps those up to the first that was not drafted. Prompts run in a pass of their own, so
that the arithmetic of a decoding token does not depend on who reads a prompt beside it.

T packed new tokens, R rows to decide, L sparse layers, A active experts.
"""

import itertools
import math
import time
from collections import Counter

import numpy as np
import torch

from openmimo.core.records import TokenLogprob
from openmimo.engine.cache import PageArena
from openmimo.engine.context import PagedContext, RotaryRows, Span
from openmimo.engine.draft_length import DraftLength
from openmimo.engine.request_state import NOT_FINITE, Decision, RequestState
from openmimo.engine.sampler import Draw, LogitChange, chosen_logprobs, sample
from openmimo.engine.speculative import Drafter, count_accepted
from openmimo.engine.stats import EngineStats
from openmimo.model.backbone import Hidden
from openmimo.model.mimo import MiMo


class Runner:
    """A model, its arena, and the heads that draft for it (none if `num_drafts` is 0). The sequences hold the rest."""

    def __init__(
        self, model: MiMo, arena: PageArena, *, num_drafts: int, draft_length: DraftLength, stats: EngineStats
    ):
        self.stats = stats
        self._model = model
        self._arena = arena
        self._rotary = RotaryRows(model.device)
        self._drafter = Drafter(model, arena, num_drafts, self._rotary) if num_drafts else None
        self._draft_length = draft_length
        self._routing_dtype = np.uint8 if model.config.moe and model.config.moe.num_experts <= 256 else np.int16

    @torch.inference_mode()
    def decode(self, sequences: list[RequestState], policy_version: int) -> None:
        """Gives every sequence at least one more token, and up to one more than it had drafts."""
        start = time.perf_counter()
        num_drafted = max(len(sequence.drafts) for sequence in sequences)
        fed = [[sequence.tokens[-1], *sequence.drafts] for sequence in sequences]
        hidden, routing = self._forward(sequences, fed)
        decided = self._decide(hidden.post_norm_TD, [draw for sequence in sequences for draw in draws_of(sequence)])
        self.stats.num_prompt_tokens += sum(sequence.computed < sequence.prompt_length for sequence in sequences)
        first = 0
        for sequence, row in zip(sequences, fed, strict=True):
            rows = slice(first, first + len(row))
            self._confirm(sequence, hidden, rows, decided[rows], policy_version)
            if sequence.params.routed_experts:
                num_new = min(sequence.computed - len(sequence.routing), len(row))
                sequence.routing.append(routing[first : first + num_new])
            first += len(row)
        self.stats.num_steps += 1
        self.stats.sequence_steps += len(sequences)
        if self._draft(sequences) == num_drafted:
            self._draft_length.observe(len(sequences), num_drafted, time.perf_counter() - start)

    @torch.inference_mode()
    def prefill(self, prefills: list[tuple[RequestState, int]], policy_version: int) -> None:
        """Reads pieces of prompts, each up to its stop; a sequence that is then wholly read gets its next token."""
        sequences = [sequence for sequence, _ in prefills]
        fed = [sequence.tokens[sequence.computed : stop] for sequence, stop in prefills]
        hidden, routing = self._forward(sequences, fed)
        ends = list(itertools.accumulate(map(len, fed)))
        for sequence, tokens, end in zip(sequences, fed, ends, strict=True):
            rows = slice(end - len(tokens), end)
            if sequence.params.prompt_logprobs:
                self._score_prompt(sequence, hidden.post_norm_TD[rows], tokens)
            if sequence.params.routed_experts:
                sequence.routing.append(routing[rows])
            sequence.computed += len(tokens)
            if self._drafter:
                self._drafter.observe(sequence, hidden, rows)
        read = [
            (sequence, end - 1)
            for sequence, end in zip(sequences, ends, strict=True)
            if not (sequence.remaining or sequence.finish_reason)
        ]
        if self._drafter:
            self._drafter.follow_prompt(sequences)
        self.stats.num_prompt_tokens += sum(map(len, fed))
        if read:
            last_rows = torch.tensor([row for _, row in read], device=self._model.device)
            decided = self._decide(hidden.post_norm_TD[last_rows], [draws_of(sequence)[0] for sequence, _ in read])
            for (sequence, _), decision in zip(read, decided, strict=True):
                sequence.add(decision, drafted=False, policy_version=policy_version)
            self.stats.num_new_tokens += len(read)
            self._draft([sequence for sequence, _ in read])

    def _confirm(
        self, sequence: RequestState, hidden: Hidden, rows: slice, decided: list[Decision], policy_version: int
    ) -> None:
        """Keeps a sequence's tokens up to the first that was not drafted."""
        drafts, sequence.drafts = sequence.drafts, []
        num_accepted = count_accepted(drafts, [decision.token for decision in decided])
        length_before, computed_before = len(sequence.tokens), sequence.computed
        for index, decision in enumerate(decided[: num_accepted + 1]):
            if not sequence.finish_reason:
                sequence.add(decision, drafted=index < num_accepted, policy_version=policy_version)
        sequence.computed = min(sequence.computed + num_accepted + 1, len(sequence.tokens) - 1)
        if self._drafter:
            num_new = sequence.computed - computed_before  # fewer than were fed where the text ended among its drafts
            self._drafter.observe(sequence, hidden, slice(rows.start, rows.start + num_new))
            self.stats.count_drafts(len(drafts), num_accepted)
            self._draft_length.judge(len(drafts), num_accepted)
        self.stats.num_decoded_tokens += len(sequence.tokens) - length_before
        self.stats.num_new_tokens += len(sequence.tokens) - length_before

    def _draft(self, sequences: list[RequestState]) -> int:
        """Gives those that go on their next drafts; how many at most."""
        running = [sequence for sequence in sequences if not sequence.finish_reason]
        if not self._drafter or not running:
            return 0
        num_drafts = self._draft_length.choose(len(running))
        self._drafter.draft(running, num_drafts)
        return num_drafts

    def _forward(self, sequences: list[RequestState], fed: list[list[int]]) -> tuple[Hidden, np.ndarray | None]:
        """One pass over the next tokens of each; the second is its routed experts [T, L, A], if any sequence asks."""
        spans = [
            Span(sequence.pages, sequence.computed, sequence.computed + len(tokens))
            for sequence, tokens in zip(sequences, fed, strict=True)
        ]
        context = PagedContext(self._arena, spans, rotary=self._rotary)
        context.routing.record = any(sequence.params.routed_experts for sequence in sequences)
        tokens = [token for tokens in fed for token in tokens]
        hidden = self._model(torch.tensor(tokens, device=self._model.device), context)
        if not context.routing.record:
            return hidden, None
        ids = [context.routing.recorded[layer] for layer in sorted(context.routing.recorded)]
        return hidden, torch.stack(ids, dim=1).cpu().numpy().astype(self._routing_dtype)

    def _decide(self, states_RD: torch.Tensor, draws: list[Draw]) -> list[Decision]:
        """A token for each row, with its log-probability if any request of the batch asks for them."""
        logits_RV = self._model.head(states_RD)
        tokens = sample(logits_RV, draws)
        if not any(draw.params.logprobs or draw.params.top_logprobs for draw in draws):
            return [Decision(token, None) for token in tokens]
        return [
            Decision(token, logprob)
            for token, logprob in zip(tokens, chosen_logprobs(logits_RV, tokens, draws), strict=True)
        ]

    def _score_prompt(self, sequence: RequestState, states_TD: torch.Tensor, tokens: list[int]) -> None:
        """Log-probabilities of the tokens after the ones just read, as far as they belong to the prompt.

        Ends the sequence where one is not finite.
        """
        known = len(sequence.prompt_logprobs)  # more than none where a preempted prompt is read again
        first = max(sequence.computed, known)
        stop = min(sequence.computed + len(tokens), sequence.prompt_length - 1)
        if first >= stop:
            return
        targets = sequence.tokens[first + 1 : stop + 1]
        rows = slice(first - sequence.computed, stop - sequence.computed)
        targets_T = torch.tensor(targets, device=states_TD.device)
        temperature = sequence.params.temperature or 1.0
        logprobs = self._model.head.logprobs(states_TD[rows], targets_T, temperature).tolist()
        if not all(map(math.isfinite, logprobs)):
            sequence.finish("error", NOT_FINITE)
            return
        sequence.prompt_logprobs += [TokenLogprob(*pair) for pair in zip(targets, logprobs, strict=True)]


def draws_of(sequence: RequestState) -> list[Draw]:
    """What to decide after a sequence's newest token and after each of its drafts."""
    params, length = sequence.params, len(sequence.tokens)
    if not params.changes_logits:
        return [Draw(params, sequence.seed, length + offset) for offset in range(len(sequence.drafts) + 1)]
    changes = _changes(sequence)
    return [Draw(params, sequence.seed, length + offset, change) for offset, change in enumerate(changes)]


def _changes(sequence: RequestState) -> list[LogitChange]:
    """The logit changes at each position to decide, as if the drafts before it were text.

    Behind a draft that the structure forbids, nothing matters: that draft will not be chosen.
    """
    new_tokens = len(sequence.tokens) - sequence.prompt_length
    counts = sequence.token_counts
    changes, num_accepted, is_open = [], 0, True
    for offset, draft in enumerate([*sequence.drafts, None]):
        allowed_V = None
        if sequence.structure is not None and is_open:
            allowed_V = sequence.structure.allowed()
        must_go_on = new_tokens + offset < sequence.params.min_tokens
        forbidden = sequence.stop_ids if must_go_on else frozenset()
        changes.append(LogitChange(sequence.prompt_ids, counts, forbidden, allowed_V))
        if draft is None:
            break
        counts = counts + Counter((draft,))
        if allowed_V is not None:
            is_open = bool(allowed_V[draft]) and draft not in sequence.stop_ids
            if is_open:
                sequence.structure.accept(draft)
                num_accepted += 1
    if num_accepted:
        sequence.structure.rollback(num_accepted)
    return changes
