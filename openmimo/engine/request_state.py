"""The state of one request while the engine runs it: tokens, cache positions, text, and recorded routes.

L sparse layers, A active experts.
"""

import bisect
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from openmimo.core.records import Completion, Delta, Request, SamplingParams, TokenLogprob
from openmimo.data.tokenizer import StreamDecoder
from openmimo.engine.cache import PageTables, PrefixNode
from openmimo.engine.sampler import NO_TOKEN


class TextStream:
    """The text of one growing sequence.

    Attributes:
        stopped: Whether a stop string was found. The text ends before it.
        stop_string: The stop string that was found, or empty.
    """

    def __init__(self, decoder: StreamDecoder, stop: tuple[str, ...] = ()):
        self.stopped = False
        self.stop_string = ""
        self._pieces: list[str] = []
        self._decoder = decoder
        self._stop = stop
        self._held_back = ""
        self._num_taken = 0

    @property
    def text(self) -> str:
        """All text that is not held back."""
        return "".join(self._pieces)

    def push(self, token_id: int, *, may_stop: bool = True) -> None:
        """Adds one token. If `may_stop` is false, a stop string that it completes is ordinary text."""
        self._release(self._decoder.push([token_id]), may_stop)

    def finish(self) -> None:
        """Ends the text. Held-back text is added, unless a stop string was found."""
        self._release(self._decoder.flush(), may_stop=True)
        if not self.stopped:
            self._pieces.append(self._held_back)
            self._held_back = ""

    def take(self) -> str:
        """The text that was added since the last call."""
        piece = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return piece

    def _release(self, new_text: str, may_stop: bool) -> None:
        if self.stopped:
            return
        pending = self._held_back + new_text
        if not may_stop:
            self._pieces.append(pending)
            self._held_back = ""
            return
        found = [(index, stop) for stop in self._stop if (index := pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            index, self.stop_string = min(found)
            self._pieces.append(pending[:index])
            self._held_back = ""
            return
        certain = len(pending) - max((_overlap(pending, stop) for stop in self._stop), default=0)
        self._pieces.append(pending[:certain])
        self._held_back = pending[certain:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


_ROWS_OF_A_PIECE = 64


class RoutedRows:
    """An integer array [positions, L, A] that grows at its end, kept in pieces.

    New rows are first kept as they come (views of the results of a step) and then copied together into a piece:

        pieces          | rows 0 to 99 (a prompt) | rows 100 to 163 |
        new rows                                                    | row 164 | row 165 |

    So a row is copied once, when it is appended, and no piece is copied or changed later.
    """

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._ends: list[int] = []  # the number of rows up to the end of each piece
        self._new_rows: list[np.ndarray] = []
        self._length = self._num_packed = 0

    def __len__(self) -> int:
        return self._length

    def append(self, rows: np.ndarray) -> None:
        """Adds the experts of the next positions, integers [rows, L, A], which must not be changed afterwards."""
        self._new_rows.append(rows)
        self._length += len(rows)
        if self._length - self._num_packed >= _ROWS_OF_A_PIECE:
            self._pack()

    def between(self, start: int, stop: int) -> np.ndarray:
        """The rows of positions `start` to `stop`, at least one. They may share memory and must not be changed.

        A result that is a small part of a piece is a copy, so that it does not keep the piece in memory.
        """
        assert 0 <= start < stop <= self._length
        if stop > self._num_packed:
            self._pack()
        found, number = [], bisect.bisect_right(self._ends, start)
        for piece, end in zip(self._pieces[number:], self._ends[number:], strict=True):
            first = end - len(piece)
            if first >= stop:
                break
            found.append(piece[max(start - first, 0) : stop - first])
        is_most_of_a_piece = len(found) == 1 and 2 * (stop - start) >= len(self._pieces[number])
        return found[0] if is_most_of_a_piece else np.concatenate(found)

    def array(self) -> np.ndarray | None:
        """A copy of all rows; None if there are none."""
        self._pack()
        return np.concatenate(self._pieces) if self._pieces else None

    def continued(self) -> "RoutedRows":
        """An object with the same rows, to append to. It shares the pieces."""
        self._pack()
        other = RoutedRows()
        other._pieces, other._ends = list(self._pieces), list(self._ends)
        other._length = other._num_packed = self._length
        return other

    def _pack(self) -> None:
        """Copies the new rows into a piece."""
        if self._new_rows:
            self._pieces.append(np.concatenate(self._new_rows))
            self._ends.append(self._length)
            self._new_rows = []
            self._num_packed = self._length


if TYPE_CHECKING:
    from openmimo.engine.structured import StructureState

_MAX_REPEATED_PASSAGE = 64
NOT_FINITE = (
    "the model's logits are not finite: its weights hold NaN or infinite values, or its config.json does not fit them"
)


class Decision(NamedTuple):
    """The token chosen at one position.

    Attributes:
        token: The token; `sampler.NO_TOKEN` if none can be chosen.
        logprob: Its log-probability; None if the step computed none.
        top: The likeliest ids and their log-probabilities, if requested.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False, slots=True)  # with slots, attributes are read in half the time
class RequestState:
    """One request: its confirmed tokens, its pages, its drafts, and its results so far.

    Attributes:
        request: The request.
        params: Its sampling parameters.
        prompt_length: Number of prompt tokens.
        tokens: Confirmed tokens, the prompt first.
        seed: Seed of its random numbers.
        max_length: The most tokens, prompt included.
        stop_ids: Tokens that end the text.
        arrival: Its number in the order of arrival.
        pages: Page tables; None while it holds no pages.
        num_computed_tokens: Positions that the main layers have computed or that were queued: all tokens but the last
            while it decodes, fewer while its prompt is read, or read again after a preemption.
        num_pending_tokens: Tokens that a worker has decided or will decide, after `tokens`, and the host has not read.
        num_possible_tokens: Tokens that a queued step may decide in addition to the pending ones: its drafts.
        decided_place: The entry of the worker's decided tokens that holds the newest of them.
        num_cached_tokens: Prompt tokens that were reused from the prefix cache or the session.
        text: The text so far; None without a tokenizer.
        structure: State of the grammar; None without structured output.
        node: Node of the prefix tree up to which the tree has its blocks; None if it no longer adds blocks.
        states_start: The first position whose main-model state the worker still keeps for the heads.
        head_lengths: Positions that each head has computed.
        steps_by_drafts: Its decoding steps by the number of its drafts.
        accepted_by_head: Its accepted drafts of each head.
        logprobs: Log-probability of each new token, if requested.
        top_logprobs: The likeliest ids and their log-probabilities at each new token, if requested.
        prompt_logprobs: Of each prompt token but the first, if requested.
        pooled: The pooled states of the prompt so far, if requested.
        policy_versions: Version of the weights that chose each new token.
        drafted: For each new token, whether it was drafted.
        blocks: Blocks of tokens that `block` has made.
        repeats: Counter of repeated passages; None without `SamplingParams.max_repeats`.
        routing: Routed experts of the computed positions, if requested.
        is_plain: Whether its tokens are the likeliest ones, without log-probabilities or changes of the logits.
        may_run_ahead: Whether a step can be planned before the host has read the token of the one before.
        sampled_pages: The page tables for whose seat the worker has the sampling parameters of this request.
        followed_pages: The page tables with which the worker counts its tokens, for steps that are planned ahead.
        num_counted_tokens: New tokens that the worker has counted for the penalties.
        finish_reason: As in `Delta`; "" while it runs.
        error: As in `Delta`.
        is_request_error: As in `Delta`.
        num_reported: New tokens that `take_delta` has returned.
    """

    request: Request
    tokens: list[int]
    seed: int
    max_length: int
    stop_ids: frozenset[int]
    arrival: int = 0
    pages: PageTables | None = None
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_possible_tokens: int = 0
    decided_place: int = 0
    num_cached_tokens: int = 0
    text: TextStream | None = None
    structure: "StructureState | None" = None
    node: PrefixNode | None = None
    states_start: int = 0
    head_lengths: list[int] = field(default_factory=list)
    steps_by_drafts: list[int] = field(default_factory=list)
    accepted_by_head: list[int] = field(default_factory=list)
    logprobs: array = field(default_factory=lambda: array("d"))
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    pooled: "PooledStates | None" = None
    policy_versions: array = field(default_factory=lambda: array("i"))
    drafted: bytearray = field(default_factory=bytearray)
    blocks: list[bytes] = field(default_factory=list)
    repeats: "RepeatCounter | None" = None
    routing: RoutedRows = field(default_factory=RoutedRows)
    sampled_pages: PageTables | None = None
    followed_pages: PageTables | None = None
    num_counted_tokens: int = 0
    finish_reason: str = ""
    error: str = ""
    is_request_error: bool = False
    num_reported: int = 0

    params: SamplingParams = field(init=False)
    prompt_length: int = field(init=False)
    is_plain: bool = field(init=False)
    may_run_ahead: bool = field(init=False)

    def __post_init__(self) -> None:
        self.params = self.request.params
        self.prompt_length = len(self.request.prompt_token_ids)
        params = self.params
        has_numbers = params.temperature > 0.0 or params.logprobs or params.top_logprobs
        self.is_plain = not (has_numbers or params.changes_logits)
        penalizes = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        reads_pass = params.routed_experts or params.reads_whole_prompt or params.pooling
        self.may_run_ahead = not (penalizes or reads_pass or params.structure)
        if self.params.max_repeats:
            self.repeats = RepeatCounter(self.params.max_repeats)
        if self.params.pooling:
            self.pooled = PooledStates()

    @property
    def held_pages(self) -> PageTables:
        """Its page tables. It must hold some, as every running request does."""
        assert self.pages is not None, f"request {self.request.id} holds no pages"
        return self.pages

    def block(self, number: int, size: int) -> bytes:
        """Block `number` of `size` tokens, int32 as bytes. Blocks are cached, because tokens never change."""
        for start in range(len(self.blocks) * size, (number + 1) * size, size):
            self.blocks.append(array("i", self.tokens[start : start + size]).tobytes())
        return self.blocks[number]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens, pending ones included, that the main layers have not computed: 1 while it decodes."""
        return len(self.tokens) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def max_new_tokens_left(self) -> int:
        """Tokens until `max_length`, without pending ones."""
        return self.max_length - len(self.tokens) - self.num_pending_tokens

    @property
    def is_below_min_tokens(self) -> bool:
        """Whether the text is too short to end (`SamplingParams.min_tokens`)."""
        return len(self.tokens) - self.prompt_length < self.params.min_tokens

    def add(self, decision: Decision, *, drafted: bool, policy_version: int) -> None:
        """Confirms one token, and finishes the request if it is the last."""
        token, logprob, top = decision
        if token == NO_TOKEN:
            if self.structure is None or self.structure.allowed().any():
                self.finish("error", NOT_FINITE)
            else:
                self._fail_structure()
            return
        self.tokens.append(token)
        self.drafted.append(drafted)
        self.policy_versions.append(policy_version)
        params = self.params
        if params.logprobs:
            assert logprob is not None, "the step computed no log-probabilities"
            self.logprobs.append(logprob)
        if params.top_logprobs:
            self.top_logprobs.append(top)
        if token in self.stop_ids:
            self.finish("stop")
            return
        if self.structure is not None:
            self.structure.accept(token)
            if self.structure.error:
                self._fail_structure()
                return
        if self.text is not None:
            self.text.push(token, may_stop=not self.is_below_min_tokens)
            if self.text.stopped:
                self.finish("stop")
                return
        if self.repeats is not None and self.repeats.add(token):
            self.finish("repetition")
        elif len(self.tokens) == self.max_length:
            self.finish("length")

    def count_drafts(self, num_offered: int, num_accepted: int) -> None:
        """Counts a decoding step in which the first `num_accepted` of `num_offered` drafts were right."""
        self.steps_by_drafts[num_offered] += 1
        for head in range(num_accepted):
            self.accepted_by_head[head] += 1

    def finish(self, reason: str, error: str = "", *, is_request_error: bool = False) -> None:
        """Ends the request; no token may be added afterwards."""
        self.finish_reason = reason
        self.error = error
        self.is_request_error = is_request_error
        if self.text is not None:
            self.text.finish()

    def forget_computed(self) -> None:
        """Releases its pages and forgets everything computed with them. Its tokens stay, to be read again."""
        if self.pages is not None:
            self.pages.release()
        self.pages = None
        self.node = None
        self.num_computed_tokens = 0
        self.states_start = 0
        self.head_lengths = [0] * len(self.head_lengths)
        self.routing = RoutedRows()

    def take_delta(self) -> Delta:
        """The new tokens, text and state since the last call."""
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
            embedding=tuple(self.pooled.embedding()) if self.pooled is not None and start == 0 else (),
            stop_string=self.text.stop_string if self.text is not None else "",
        )

    def completion(self) -> Completion:
        """The result. The token that ended the text is in `token_ids` but not in `text`."""
        params = self.params
        return Completion(
            prompt_token_ids=self.tokens[: self.prompt_length],
            token_ids=self.tokens[self.prompt_length :],
            text=self.text.text if self.text is not None else "",
            logprobs=self.logprobs.tolist() if params.logprobs else None,
            finish_reason=self.finish_reason,
            top_logprobs=list(self.top_logprobs) if params.top_logprobs else None,
            prompt_logprobs=[entry.logprob for entry in self.prompt_logprobs] if params.prompt_logprobs else None,
            prompt_top_logprobs=[entry.top for entry in self.prompt_logprobs] if params.prompt_top_logprobs else None,
            embedding=self.pooled.embedding() if self.pooled is not None else None,
            policy_versions=self.policy_versions.tolist(),
            drafted=list(map(bool, self.drafted)),
            routed_experts=self.routing.array(),
            num_cached_tokens=self.num_cached_tokens,
            error=self.error,
            steps_by_drafts=list(self.steps_by_drafts),
            accepted_by_head=list(self.accepted_by_head),
        )

    def _fail_structure(self) -> None:
        assert self.structure is not None
        message = f"the structure cannot be followed further: {self.structure.error or 'no token is allowed'}"
        self.finish("error", message, is_request_error=True)

    def _logprobs_between(self, start: int, stop: int) -> tuple[TokenLogprob, ...]:
        tokens = self.tokens[self.prompt_length + start : self.prompt_length + stop]
        tops = self.top_logprobs[start:stop] if self.params.top_logprobs else [()] * len(tokens)
        return tuple(TokenLogprob(*entry) for entry in zip(tokens, self.logprobs[start:stop], tops, strict=True))


class PooledStates:
    """The sum of the final states of a prompt's positions, or the state of the last one.

    Attributes:
        num_positions: Number of positions that have been added.
    """

    def __init__(self) -> None:
        self.num_positions = 0
        self._pooled_D: torch.Tensor | None = None
        self._divisor = 1

    def add(self, states_TD: torch.Tensor, *, pooling: str) -> None:
        """Adds the states of the next positions."""
        self.num_positions += len(states_TD)
        if pooling == "last":
            self._pooled_D = states_TD[-1].double()
            return
        sum_D = states_TD.double().sum(dim=0)
        self._pooled_D = sum_D if self._pooled_D is None else self._pooled_D + sum_D
        self._divisor = self.num_positions

    def embedding(self) -> list[float]:
        """The pooled state; empty before the first position."""
        return [] if self._pooled_D is None else (self._pooled_D / self._divisor).tolist()


class RepeatCounter:
    """Detects a text that ends in the same passage `times` times in a row.

    A passage of n tokens is repeated if each of the last n * (times - 1) tokens equals the token n before it. The
    counter keeps the length of this run for each n up to 64, so the cost per token does not grow with the text.
    """

    def __init__(self, times: int):
        self._needed = [length * (times - 1) for length in range(_MAX_REPEATED_PASSAGE + 1)]
        self._newest: deque[int] = deque(maxlen=_MAX_REPEATED_PASSAGE)  # the newest token first
        self._runs: dict[int, int] = {}

    def add(self, token: int) -> bool:
        """Adds a token; returns whether the text now ends in a repetition."""
        runs = self._runs
        equal = (length for length, earlier in enumerate(self._newest, 1) if earlier == token)
        self._runs = {length: runs.get(length, 0) + 1 for length in equal}
        self._newest.appendleft(token)
        return any(run >= self._needed[length] for length, run in self._runs.items())
