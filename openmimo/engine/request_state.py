"""The state of one request while it is decoded."""

import functools
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from openmimo.core.records import Completion, Delta, Request, SamplingParams, TokenLogprob
from openmimo.engine.cache import PageTables, PrefixNode
from openmimo.engine.routed_rows import RoutedRows
from openmimo.engine.sampler import NO_TOKEN
from openmimo.engine.text import TextStream

if TYPE_CHECKING:
    from openmimo.engine.structured import StructureState

_MAX_REPEATED_PASSAGE = 64
NOT_FINITE = (
    "the model's logits are not finite: its weights hold NaN or infinite values, or its config.json does not fit them"
)


class Decision(NamedTuple):
    """The token chosen at one position, and its log-probability if asked for."""

    token: int
    logprob: TokenLogprob | None


@dataclass(eq=False)
class RequestState:
    """One request: its confirmed tokens (prompt first), its pages, and what is still to be confirmed.

    num_computed_tokens: how many positions the main layers have seen; all tokens but the last while it decodes, fewer
    while its prompt is read, or read again after a preemption. max_length: tokens at most, prompt included. drafts:
    tokens that the MTP heads expect next. states_start: the first position whose main-model state a worker still keeps
    for the heads. head_lengths: how many positions each head has seen. text: None where there is no tokenizer. node:
    the place in the prefix cache up to which its blocks are known there. routing: routed experts of the computed
    positions, if requested. finish_reason, error, is_request_error: as in Delta, "" while it runs.
    """

    request: Request
    tokens: list[int]
    seed: int
    max_length: int
    stop_ids: frozenset[int]
    arrival: int = 0
    pages: PageTables | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    text: TextStream | None = None
    structure: "StructureState | None" = None
    node: PrefixNode | None = None
    drafts: list[int] = field(default_factory=list)
    states_start: int = 0
    head_lengths: list[int] = field(default_factory=list)
    logprobs: array = field(default_factory=lambda: array("d"))
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    policy_versions: array = field(default_factory=lambda: array("i"))
    drafted: bytearray = field(default_factory=bytearray)
    blocks: list[bytes] = field(default_factory=list)
    repeats: "RepeatCounter | None" = None
    routing: RoutedRows = field(default_factory=RoutedRows)
    token_counts: Counter[int] | None = None
    finish_reason: str = ""
    error: str = ""
    is_request_error: bool = False
    num_reported: int = 0

    def __post_init__(self) -> None:
        if self.params.max_repeats:
            self.repeats = RepeatCounter(self.params.max_repeats)

    @property
    def params(self) -> SamplingParams:
        """How it is decoded."""
        return self.request.params

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @functools.cached_property
    def prompt_ids(self) -> frozenset[int]:
        """The distinct tokens of the prompt."""
        return frozenset(self.request.prompt_token_ids)

    def block(self, number: int, size: int) -> bytes:
        """Block `number` of its tokens, `size` each, int32 as bytes. Each is made once: tokens never change."""
        for start in range(len(self.blocks) * size, (number + 1) * size, size):
            self.blocks.append(array("i", self.tokens[start : start + size]).tobytes())
        return self.blocks[number]

    @property
    def num_uncomputed_tokens(self) -> int:
        """How many of its tokens the main layers have not seen: 1 while it decodes."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def max_new_tokens_left(self) -> int:
        """How many tokens may still come."""
        return self.max_length - len(self.tokens)

    @property
    def must_go_on(self) -> bool:
        """Whether the text is still too short to end."""
        return len(self.tokens) - self.prompt_length < self.params.min_tokens

    def add(self, decision: Decision, *, drafted: bool, policy_version: int) -> None:
        """Confirms one token, and decides whether it is the last."""
        token = decision.token
        if token == NO_TOKEN:
            if self.structure is None or self.structure.allowed().any():
                self.finish("error", NOT_FINITE)
            else:
                self._fail_structure()
            return
        self.tokens.append(token)
        self.drafted.append(drafted)
        self.policy_versions.append(policy_version)
        if self.params.logprobs:
            self.logprobs.append(decision.logprob.logprob)
        if self.params.top_logprobs:
            self.top_logprobs.append(decision.logprob.top)
        if self.token_counts is not None:
            self.token_counts[token] += 1
        if token in self.stop_ids:
            self.finish("stop")
            return
        if self.structure is not None:
            self.structure.accept(token)
            if self.structure.error:
                self._fail_structure()
                return
        if self.text is not None:
            self.text.push(token, may_stop=not self.must_go_on)
            if self.text.stopped:
                self.finish("stop")
                return
        if self.repeats is not None and self.repeats.add(token):
            self.finish("repetition")
        elif self.max_new_tokens_left == 0:
            self.finish("length")

    def finish(self, reason: str, error: str = "", *, is_request_error: bool = False) -> None:
        """Ends it: nothing more will be added."""
        self.finish_reason = reason
        self.error = error
        self.is_request_error = is_request_error
        self.drafts = []
        if self.text is not None:
            self.text.finish()

    def forget_computed(self) -> None:
        """Gives back its pages and all that was computed from them; its tokens stay, to be read again."""
        if self.pages is not None:
            self.pages.release()
        self.pages = None
        self.node = None
        self.num_computed_tokens = 0
        self.drafts = []
        self.states_start = 0
        self.head_lengths = [0] * len(self.head_lengths)
        self.routing = RoutedRows()

    def take_delta(self) -> Delta:
        """What has come since the last call."""
        start, new = self.num_reported, len(self.tokens) - self.prompt_length
        self.num_reported = new
        return Delta(
            request_id=self.request.id,
            token_ids=tuple(self.tokens[self.prompt_length + start :]),
            text=self.text.take() if self.text is not None else "",
            logprobs=self._logprobs_between(start, new) if self.params.logprobs else (),
            drafted=tuple(map(bool, self.drafted[start:])),
            finish_reason=self.finish_reason,
            error=self.error,
            is_request_error=self.is_request_error,
            num_prompt_tokens=self.prompt_length,
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=tuple(self.prompt_logprobs) if start == 0 else (),
        )

    def completion(self) -> Completion:
        """The record that the caller gets. The token that ended it is in `token_ids` but not in the text."""
        params = self.params
        return Completion(
            prompt_token_ids=self.tokens[: self.prompt_length],
            token_ids=self.tokens[self.prompt_length :],
            text=self.text.text if self.text is not None else "",
            logprobs=self.logprobs.tolist() if params.logprobs else None,
            finish_reason=self.finish_reason,
            top_logprobs=list(self.top_logprobs) if params.top_logprobs else None,
            prompt_logprobs=[entry.logprob for entry in self.prompt_logprobs] if params.prompt_logprobs else None,
            policy_versions=self.policy_versions.tolist(),
            drafted=list(map(bool, self.drafted)),
            routed_experts=self.routing.between(0, len(self.routing)).copy() if len(self.routing) else None,
            num_cached_tokens=self.num_cached_tokens,
            error=self.error,
        )

    def _fail_structure(self) -> None:
        message = f"the structure cannot be followed further: {self.structure.error or 'no token is allowed'}"
        self.finish("error", message, is_request_error=True)

    def _logprobs_between(self, start: int, stop: int) -> tuple[TokenLogprob, ...]:
        tokens = self.tokens[self.prompt_length + start : self.prompt_length + stop]
        tops = self.top_logprobs[start:stop] if self.params.top_logprobs else [()] * len(tokens)
        return tuple(TokenLogprob(*entry) for entry in zip(tokens, self.logprobs[start:stop], tops, strict=True))


class RepeatCounter:
    """Finds the first token with which a text ends in one passage `times` times in a row.

    A passage of n tokens is repeated if each of the last n * (times - 1) tokens equals the one n before it. The counter
    holds the length of this run for each n, so a token costs the same however long passages and text are.
    """

    def __init__(self, times: int):
        self._needed = [length * (times - 1) for length in range(_MAX_REPEATED_PASSAGE + 1)]
        self._newest: deque[int] = deque(maxlen=_MAX_REPEATED_PASSAGE)  # the newest token first
        self._runs: dict[int, int] = {}

    def add(self, token: int) -> bool:
        """Adds a token. Whether the text now ends in such a repetition."""
        runs = self._runs
        equal = (length for length, earlier in enumerate(self._newest, 1) if earlier == token)
        self._runs = {length: runs.get(length, 0) + 1 for length in equal}
        self._newest.appendleft(token)
        return any(run >= self._needed[length] for length, run in self._runs.items())
