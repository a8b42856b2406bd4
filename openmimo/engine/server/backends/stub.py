"""A backend without a model, whose replies come from a script. For the server's tests and `openmimo serve --stub`."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from openmimo.core.errors import UserError
from openmimo.core.records import Delta, Request, TokenLogprob
from openmimo.data.tokenizer import StreamDecoder, Tokenizer
from openmimo.engine.request_state import TextStream
from openmimo.engine.server.backends.protocol import BackendGauges

_CORPUS = ["The quick brown fox jumps over the lazy dog, 0123456789.\n", "def add(a, b):\n    return a + b\n"]
_PAGE_TOKENS = 16
_BYTES_PER_TOKEN = 1024


@dataclass(frozen=True)
class Step:
    """One engine step of a scripted reply.

    Attributes:
        tokens: Texts of the step. All texts except the last count as accepted drafts. A text may be several tokens
            of the tokenizer, which are then all drafted or all not.
        error: Error message; a non-empty one ends the reply.
    """

    tokens: tuple[str, ...]
    error: str = ""


Script = Callable[[str, Request], Iterable[Step]]


def echo(prompt: str, request: Request) -> Iterable[Step]:
    """Repeat the last user turn of a chat, or the whole prompt, one word per step."""
    user_text = prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
    return [Step((word,)) for word in user_text.replace(" ", "\0 ").split("\0")]


class StubBackend:
    """Replies with the steps of `script(prompt text, request)`.

    Applies max_tokens and stop strings, invents log-probabilities that depend only on the token, and updates the same
    counters as a real backend.

    Args:
        script: Produces the steps of a reply.
        tokenizer: Tokenizer of prompts and replies (default: one trained on two sentences).
        model_name: Model name in the API.
        max_positions: Maximum number of tokens of prompt plus reply.
        step_seconds: Pause before each step.
        slots: Number of requests that run at once; further requests wait.
    """

    def __init__(
        self,
        script: Script = echo,
        *,
        tokenizer: Tokenizer | None = None,
        model_name: str = "stub",
        max_positions: int = 4096,
        step_seconds: float = 0.0,
        slots: int = 64,
    ):
        self.model_name = model_name
        self.model_aliases: tuple[str, ...] = ()
        self.tokenizer = tokenizer or Tokenizer.train(_CORPUS, vocab_size=320)
        self.max_positions = max_positions
        self.running: set[str] = set()
        self.requests: list[Request] = []
        self.is_healthy = True
        self._script = script
        self._step_seconds = step_seconds
        self._slots = asyncio.Semaphore(slots)
        self._num_waiting = 0
        self._num_prompt_tokens = 0
        self._num_new_tokens = 0
        self._offered = [0, 0, 0]
        self._accepted = [0, 0, 0]
        self._num_steps = 0

    def check(self, request: Request) -> None:
        """Raise UserError for an empty prompt, one that leaves no room, or an id outside the vocabulary."""
        ids = request.prompt_token_ids
        if not ids:
            raise UserError("the prompt is empty; give at least one token.")
        if len(ids) >= self.max_positions:
            raise UserError(f"the prompt has {len(ids)} tokens, but there are {self.max_positions} positions.")
        outside = [token for token in (*ids, *request.params.logit_bias) if not 0 <= token < self.tokenizer.vocab_size]
        if outside:
            raise UserError(f"id {outside[0]} is not in the vocabulary of {self.tokenizer.vocab_size} ids.")

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1
        self.running.add(request.id)
        self._num_prompt_tokens += len(request.prompt_token_ids)
        try:
            async with aclosing(self._play(request)) as deltas:
                async for delta in deltas:
                    self._num_new_tokens += len(delta.token_ids)
                    yield delta
        finally:
            self.running.discard(request.id)
            self._slots.release()

    def gauges(self) -> BackendGauges:
        """Return the current counters. Each running request holds one cache page."""
        return BackendGauges(
            num_waiting=self._num_waiting,
            num_running=len(self.running),
            cache_bytes_used=len(self.running) * _PAGE_TOKENS * _BYTES_PER_TOKEN,
            cache_bytes_total=self.max_positions * _BYTES_PER_TOKEN,
            num_prompt_tokens=self._num_prompt_tokens,
            num_new_tokens=self._num_new_tokens,
            drafts_offered=tuple(self._offered),
            drafts_accepted=tuple(self._accepted),
            steps_by_drafts=(0, 0, 0, self._num_steps),
            is_healthy=self.is_healthy,
        )

    async def close(self) -> None:
        self.is_healthy = False

    async def _play(self, request: Request) -> AsyncGenerator[Delta, None]:
        params = request.params
        text = TextStream(StreamDecoder(self.tokenizer, skip_special=params.skip_special_tokens), params.stop)
        num_prompt_tokens = len(request.prompt_token_ids)
        room = min(params.max_tokens, self.max_positions - num_prompt_tokens)
        prompt = self.tokenizer.decode(request.prompt_token_ids, skip_special=False)
        scored_ids = request.prompt_token_ids[1:] if params.prompt_logprobs else ()
        prompt_logprobs = self._logprobs(scored_ids, params.prompt_top_logprobs)
        embedding = _embedding(request)
        for step in self._script(prompt, request):
            await asyncio.sleep(self._step_seconds)
            if step.error:
                yield Delta(request.id, finish_reason="error", error=step.error, num_prompt_tokens=num_prompt_tokens)
                return
            ids, drafted = self._tokens_of(step)
            ids = ids[:room]
            room -= len(ids)
            for token_id in ids:
                text.push(token_id)
            if not room or text.stopped:
                text.finish()
            yield Delta(
                request.id,
                token_ids=tuple(ids),
                text=text.take(),
                logprobs=self._logprobs(ids, params.top_logprobs) if params.logprobs else (),
                drafted=tuple(drafted[: len(ids)]),
                finish_reason="stop" if text.stopped else "" if room else "length",
                num_prompt_tokens=num_prompt_tokens,
                prompt_logprobs=prompt_logprobs,
                embedding=embedding,
                stop_string=text.stop_string,
            )
            if text.stopped or not room:
                return
            prompt_logprobs = embedding = ()
        text.finish()
        yield Delta(
            request.id,
            text=text.take(),
            finish_reason="stop",
            num_prompt_tokens=num_prompt_tokens,
            prompt_logprobs=prompt_logprobs,
            embedding=embedding,
            stop_string=text.stop_string,
        )

    def _tokens_of(self, step: Step) -> tuple[list[int], list[bool]]:
        ids, drafted = [], []
        for index, text in enumerate(step.tokens):
            text_ids = self.tokenizer.encode(text, allow_special=True)
            ids += text_ids
            drafted += [index < len(step.tokens) - 1] * len(text_ids)
        self._num_steps += 1
        num_accepted = min(sum(drafted), len(self._offered))
        for position in range(min(num_accepted + 1, len(self._offered))):
            self._offered[position] += 1
            self._accepted[position] += position < num_accepted
        return ids, drafted

    def _logprobs(self, ids: Iterable[int], num_top: int) -> tuple[TokenLogprob, ...]:
        vocab_size = self.tokenizer.vocab_size
        return tuple(
            TokenLogprob(
                token_id,
                -(token_id % 7) / 4 - 0.25,
                tuple(((token_id + rank) % vocab_size, -(token_id % 7) / 4 - 0.25 - rank) for rank in range(num_top)),
            )
            for token_id in ids
        )


def _embedding(request: Request) -> tuple[float, ...]:
    """The mean, or the last, of the first three bits of the prompt's ids; empty if no embedding is requested."""
    ids = {"": (), "mean": request.prompt_token_ids, "last": request.prompt_token_ids[-1:]}[request.params.pooling]
    return tuple(sum(token_id >> bit & 1 for token_id in ids) / len(ids) for bit in range(3)) if ids else ()
