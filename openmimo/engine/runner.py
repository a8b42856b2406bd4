"""The host side of a step: makes a `StepInput` from requests, and applies a `StepOutput` to them.

A decoding pass takes the newest token and the drafts of each sequence, decides a token at every position, and keeps
those up to the first that was not drafted. Plain decoding is the case without drafts. Prompts run in a separate pass,
so the arithmetic of a decoding token does not depend on the prompts of the same step.

The host waits for the device twice per step: for the decided tokens, because only the host knows which texts end (stop
strings, grammars), and for the drafts of the sequences that continue.
"""

import itertools
import math
import time
from collections import Counter

import numpy as np
import torch

from openmimo.core.records import SamplingParams, TokenLogprob
from openmimo.engine.cache import PageArena
from openmimo.engine.config import EngineConfig
from openmimo.engine.request_state import NOT_FINITE, Decision, RequestState
from openmimo.engine.sampler import Draw, LogitChange, sampling_input
from openmimo.engine.speculative import DraftLength, DraftPlanner
from openmimo.engine.stats import EngineStats
from openmimo.engine.step import HeadInput, Span, StepBuffers, StepInput, StepOutput
from openmimo.engine.worker import Worker
from openmimo.model.attention import kv_spec
from openmimo.model.mimo import MiMo

_MAX_SCORED_NUMBERS = 1 << 22  # logits held at once when a prompt is scored; 16 MiB in float32


class Runner:
    """Prepares steps for a worker and applies their results. All state of a request is in its `RequestState`."""

    def __init__(
        self,
        model: MiMo,
        arena: PageArena,
        config: EngineConfig,
        *,
        num_drafts: int,
        draft_length: DraftLength,
        stats: EngineStats,
    ):
        self.stats = stats
        self.worker = Worker(model, arena, num_drafts=num_drafts)
        self._model = model
        self._draft_length = draft_length
        self._routing_dtype = np.uint8 if model.config.moe and model.config.moe.num_experts <= 256 else np.int16
        num_layers = len(model.config.layers)
        prompt_tokens = max(config.prefill_tokens, config.mixed_prefill_tokens)

        def buffers(layers: range) -> StepBuffers:
            return StepBuffers(
                arena,
                model.device,
                layers,
                max_tokens=prompt_tokens + config.max_sequences * (2 * num_drafts + 2),
                max_sequences=config.max_sequences,
                max_positions=model.config.max_positions,
            )

        self._buffers = buffers(range(num_layers))
        self._drafting: DraftPlanner | None = None
        if num_drafts:
            assert model.config.mtp is not None
            self._drafting = DraftPlanner(
                [buffers(range(num_layers + head, num_layers + head + 1)) for head in range(num_drafts)],
                keep_positions=kv_spec(model.config.mtp.attention).keep_positions,
                ring_positions=self.worker.ring_positions,
                device=model.device,
            )

    @torch.inference_mode()
    def decode(self, sequences: list[RequestState], policy_version: int) -> None:
        """Adds at least one token to every sequence, and at most one more than it had drafts."""
        start = time.perf_counter()
        num_drafted = max(len(sequence.drafts) for sequence in sequences)
        draws = [draw for sequence in sequences for draw in draws_of(sequence)]
        output = self.worker.execute(self._decode_input(sequences, draws, num_drafted))
        decided, routing = _decisions(output, draws), self._routing(output)
        accepted = [0] * len(sequences) if output.num_accepted_B is None else output.num_accepted_B.tolist()
        self.stats.num_prompt_tokens += sum(s.num_computed_tokens < s.prompt_length for s in sequences)
        first = 0
        for sequence, num_accepted in zip(sequences, accepted, strict=True):
            num_rows = 1 + len(sequence.drafts)
            if sequence.pooled is not None:  # the last token of a prompt may be computed here
                _pool_prompt(sequence, output.states_TD[first : first + 1])
            self._confirm(sequence, decided[first : first + num_rows], num_accepted, policy_version)
            if sequence.params.routed_experts:
                assert routing is not None
                num_new = min(sequence.num_computed_tokens - len(sequence.routing), num_rows)
                sequence.routing.append(routing[first : first + num_new])
            first += num_rows
        self.stats.num_steps += 1
        self.stats.sequence_steps += len(sequences)
        if self._draft(sequences) == num_drafted:
            self._draft_length.observe(len(sequences), num_drafted, time.perf_counter() - start)

    @torch.inference_mode()
    def prefill(self, prefills: list[tuple[RequestState, int]], policy_version: int) -> None:
        """Computes chunks of prompts, each up to its stop. A sequence whose last chunk this is gets its next token."""
        sequences = [sequence for sequence, _ in prefills]
        counts = [stop - sequence.num_computed_tokens for sequence, stop in prefills]
        ends = list(itertools.accumulate(counts))
        last = [(s, end - 1) for (s, stop), end in zip(prefills, ends, strict=True) if stop == len(s.tokens)]
        draws = [draws_of(sequence)[0] for sequence, _ in last]
        output = self.worker.execute(self._prefill_input(prefills, [row for _, row in last], draws))
        routing = self._routing(output)
        for sequence, count, end in zip(sequences, counts, ends, strict=True):
            rows = slice(end - count, end)
            if sequence.params.prompt_logprobs:
                self._score_prompt(sequence, output.states_TD[rows], count)
            if sequence.pooled is not None:
                _pool_prompt(sequence, output.states_TD[rows])
            if sequence.params.routed_experts:
                assert routing is not None
                sequence.routing.append(routing[rows])
            sequence.num_computed_tokens += count
        if self._drafting:
            self._drafting.forget_old_states(sequences)
        self.stats.num_prompt_tokens += sum(counts)
        read = [sequence for sequence, _ in last if not sequence.finish_reason]
        if last:
            for (sequence, _), decision in zip(last, _decisions(output, draws), strict=True):
                if not sequence.finish_reason:
                    sequence.add(decision, drafted=False, policy_version=policy_version)
        if read:
            self.stats.num_new_tokens += len(read)
            self._draft(read)

    def _decode_input(self, sequences: list[RequestState], draws: list[Draw], num_drafted: int) -> StepInput:
        spans: list[Span] = []
        tokens: list[int] = []
        for sequence in sequences:
            computed = sequence.num_computed_tokens
            spans.append(Span(sequence.held_pages, computed, computed + 1 + len(sequence.drafts)))
            tokens.append(sequence.tokens[-1])
            tokens += sequence.drafts
        draft_rows_BK = None
        if num_drafted:
            counts = [len(sequence.drafts) for sequence in sequences]
            firsts = itertools.accumulate((1 + count for count in counts[:-1]), initial=0)
            last, rows = len(tokens) - 1, zip(firsts, counts, strict=True)
            table = [[*range(first, first + n), *[last] * (num_drafted - n)] for first, n in rows]
            draft_rows_BK = torch.tensor(table, device=self._model.device)
        return self._step_input(sequences, spans, tokens, draws, draft_rows_BK=draft_rows_BK)

    def _prefill_input(
        self, prefills: list[tuple[RequestState, int]], last_rows: list[int], draws: list[Draw]
    ) -> StepInput:
        spans = [Span(sequence.held_pages, sequence.num_computed_tokens, stop) for sequence, stop in prefills]
        tokens = [
            token for sequence, stop in prefills for token in sequence.tokens[sequence.num_computed_tokens : stop]
        ]
        heads = self._drafting.follow_prompt(prefills) if self._drafting else ()
        rows_R = torch.tensor(last_rows, device=self._model.device) if last_rows else None
        sequences = [sequence for sequence, _ in prefills]
        return self._step_input(sequences, spans, tokens, draws, prompt_heads=heads, decided_rows_R=rows_R)

    def _step_input(
        self,
        sequences: list[RequestState],
        spans: list[Span],
        tokens: list[int],
        draws: list[Draw],
        *,
        prompt_heads: tuple[HeadInput, ...] = (),
        decided_rows_R: torch.Tensor | None = None,
        draft_rows_BK: torch.Tensor | None = None,
    ) -> StepInput:
        places_T, rows_T = self._drafting.state_places(spans) if self._drafting else (None, None)
        return StepInput(
            main=self._buffers.fill(spans, tokens),
            state_places_T=places_T,
            state_rows_T=rows_T,
            prompt_heads=prompt_heads,
            decided_rows_R=decided_rows_R,
            sampling=sampling_input(draws, self._model.device) if draws else None,
            draft_rows_BK=draft_rows_BK,
            records_routing=any(sequence.params.routed_experts for sequence in sequences),
        )

    def _confirm(self, sequence: RequestState, decided: list[Decision], num_accepted: int, policy_version: int) -> None:
        """Adds the accepted drafts and the token after them to a sequence."""
        num_drafts, sequence.drafts = len(sequence.drafts), []
        length_before = len(sequence.tokens)
        for index, decision in enumerate(decided[: num_accepted + 1]):
            if not sequence.finish_reason:
                sequence.add(decision, drafted=index < num_accepted, policy_version=policy_version)
        # A text that ended among its drafts has fewer tokens than were accepted.
        sequence.num_computed_tokens = min(sequence.num_computed_tokens + num_accepted + 1, len(sequence.tokens) - 1)
        if self._drafting:
            self.stats.count_drafts(num_drafts, num_accepted)
            self._draft_length.judge(num_drafts, num_accepted)
        self.stats.num_decoded_tokens += len(sequence.tokens) - length_before
        self.stats.num_new_tokens += len(sequence.tokens) - length_before

    def _draft(self, sequences: list[RequestState]) -> int:
        """Drafts the next tokens of the unfinished sequences. Returns the number of heads that drafted."""
        running = [sequence for sequence in sequences if not sequence.finish_reason]
        if not self._drafting or not running:
            return 0
        num_drafts = self._draft_length.choose(len(running))
        heads = self._drafting.draft(running, num_drafts)
        if heads:
            drafts_BH = self.worker.draft(heads, len(running)).T.tolist()
            for sequence, drafts in zip(running, drafts_BH, strict=True):
                sequence.drafts = drafts[: max(sequence.max_new_tokens_left - 1, 0)]
        self._drafting.forget_old_states(running)
        return num_drafts

    def _routing(self, output: StepOutput) -> np.ndarray | None:
        """The routed experts of a pass on the host, [T, L, A], if recorded."""
        if output.routing_TLA is None:
            return None
        return output.routing_TLA.cpu().numpy().astype(self._routing_dtype)

    def _score_prompt(self, sequence: RequestState, states_TD: torch.Tensor, count: int) -> None:
        """Adds the log-probabilities of the prompt tokens that follow the `count` positions just computed.

        Ends the sequence with an error if one is not finite.
        """
        known = len(sequence.prompt_logprobs)  # not 0 if a preempted prompt is read again
        computed = sequence.num_computed_tokens
        first = max(computed, known)
        stop = min(computed + count, sequence.prompt_length - 1)
        if first >= stop:
            return
        targets = sequence.tokens[first + 1 : stop + 1]
        rows = slice(first - computed, stop - computed)
        entries = self._token_logprobs(states_TD[rows], targets, sequence.params)
        if not all(math.isfinite(entry.logprob) for entry in entries):
            sequence.finish("error", NOT_FINITE)
            return
        sequence.prompt_logprobs += entries

    @torch.no_grad()
    def _token_logprobs(
        self, states_TD: torch.Tensor, targets: list[int], params: SamplingParams
    ) -> list[TokenLogprob]:
        """Log-probabilities of the tokens after some positions, with the likeliest ones if `params` request them.

        The values of a position come from one tensor, so those of equal tokens are equal bit by bit.
        """
        targets_T = torch.tensor(targets, device=states_TD.device)
        temperature = params.temperature or 1.0
        if not params.prompt_top_logprobs:
            logprobs = self._model.head.logprobs(states_TD, targets_T, temperature).tolist()
            return [TokenLogprob(*pair) for pair in zip(targets, logprobs, strict=True)]
        entries: list[TokenLogprob] = []
        num_rows = max(_MAX_SCORED_NUMBERS // self._model.config.vocab_size, 1)
        for states_RD, targets_R in zip(states_TD.split(num_rows), targets_T.split(num_rows), strict=True):
            logprobs_RV = (self._model.head(states_RD) / temperature).log_softmax(dim=-1)
            chosen = logprobs_RV.gather(1, targets_R[:, None])[:, 0].tolist()
            values, ids = logprobs_RV.topk(min(params.prompt_top_logprobs, logprobs_RV.shape[1]), dim=-1)
            tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
            entries += [TokenLogprob(*entry) for entry in zip(targets_R.tolist(), chosen, tops, strict=True)]
        return entries


def _pool_prompt(sequence: RequestState, states_TD: torch.Tensor) -> None:
    """Adds the prompt positions just computed to an embedding; a preempted prompt is read again and not added again."""
    assert sequence.pooled is not None
    skipped = sequence.pooled.num_positions - sequence.num_computed_tokens
    new_TD = states_TD[max(skipped, 0) : sequence.prompt_length - sequence.num_computed_tokens]
    if len(new_TD):
        sequence.pooled.add(new_TD, pooling=sequence.params.pooling)


def _decisions(output: StepOutput, draws: list[Draw]) -> list[Decision]:
    """The decided tokens, with log-probabilities if the step computed any."""
    assert output.tokens_R is not None
    tokens = output.tokens_R.tolist()
    if output.logprobs_R is None:
        return [Decision(token, None) for token in tokens]
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(draws)
    if output.top_ids_RV is not None and output.top_logprobs_RV is not None:
        pairs = zip(output.top_ids_RV.tolist(), output.top_logprobs_RV.tolist(), draws, strict=True)
        tops = [tuple(zip(i, v, strict=True))[: draw.params.top_logprobs] for i, v, draw in pairs]
    chosen = output.logprobs_R.tolist()
    return [Decision(entry[0], TokenLogprob(*entry)) for entry in zip(tokens, chosen, tops, strict=True)]


def draws_of(sequence: RequestState) -> list[Draw]:
    """The draws after the newest token of a sequence and after each of its drafts."""
    params, length = sequence.params, len(sequence.tokens)
    if not params.changes_logits:
        return [Draw(params, sequence.seed, length + offset) for offset in range(len(sequence.drafts) + 1)]
    changes = _changes(sequence)
    return [Draw(params, sequence.seed, length + offset, change) for offset, change in enumerate(changes)]


def _changes(sequence: RequestState) -> list[LogitChange]:
    """The logit changes at each position to decide, if the drafts before it are accepted.

    After a draft that the structure forbids, no mask is computed: that draft cannot be accepted.
    """
    new_tokens = len(sequence.tokens) - sequence.prompt_length
    counts, structure = sequence.token_counts, sequence.structure
    assert counts is not None
    changes: list[LogitChange] = []
    num_accepted, is_open = 0, True
    for offset, draft in enumerate([*sequence.drafts, None]):
        allowed_V = None
        if structure is not None and is_open:
            allowed_V = structure.allowed()
        is_below_min_tokens = new_tokens + offset < sequence.params.min_tokens
        forbidden = sequence.stop_ids if is_below_min_tokens else frozenset()
        changes.append(LogitChange(sequence.prompt_ids, counts, forbidden, allowed_V))
        if draft is None:
            break
        counts = counts + Counter((draft,))
        if structure is not None and allowed_V is not None:
            is_open = bool(allowed_V[draft]) and draft not in sequence.stop_ids
            if is_open:
                structure.accept(draft)
                num_accepted += 1
    if structure is not None and num_accepted:
        structure.rollback(num_accepted)
    return changes
