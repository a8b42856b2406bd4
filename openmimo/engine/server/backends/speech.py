"""A backend that hears and speaks: chats with sound, transcription, and speech from text.

A `SpeechModel` generates one reply as an iterator of events. The backend takes one event of each running reply in turn,
so a long reply does not delay the first sound of another.
"""

import collections
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias

import numpy as np

from openmimo.core.errors import UserError
from openmimo.core.records import Delta, Request, SamplingParams
from openmimo.engine.server.backends.protocol import Backend, BackendGauges
from openmimo.engine.server.backends.threaded import ThreadedBackend


@dataclass(frozen=True, eq=False)
class Clip:
    """A piece of sound.

    Attributes:
        waveform: Samples between -1 and 1, float32, of one channel.
        sample_rate: Samples per second.
    """

    waveform: np.ndarray
    sample_rate: int

    @property
    def seconds(self) -> float:
        """The length."""
        return len(self.waveform) / self.sample_rate


Part: TypeAlias = str | Clip
SpeechOutput: TypeAlias = Literal["text", "audio", "interleaved"]


@dataclass(frozen=True)
class SpeechMessage:
    """One turn of a conversation of texts and sounds."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ChatWork:
    """The next turn of a conversation.

    Attributes:
        messages: The conversation.
        output: What the turn consists of: text, audio, or both in turn.
        thinks: Whether the model may think first.
        voice: One of the model's voices; None is its default.
    """

    messages: tuple[SpeechMessage, ...]
    output: SpeechOutput = "text"
    thinks: bool = False
    voice: str | None = None


@dataclass(frozen=True)
class TranscribeWork:
    """The text of a clip."""

    clip: Clip


@dataclass(frozen=True)
class SpeakWork:
    """The sound of a text.

    Attributes:
        text: What is said.
        instruction: How it is said; None leaves it to the model.
        voice: One of the model's voices; None is its default.
    """

    text: str
    instruction: str | None = None
    voice: str | None = None


SpeechWork: TypeAlias = ChatWork | TranscribeWork | SpeakWork


@dataclass(frozen=True)
class SpeechSampling:
    """How a reply is sampled. None leaves a value to the model.

    Attributes:
        max_tokens: Maximum number of tokens of text and patches of sound.
        text_temperature: Of the text.
        audio_temperature: Of the codes of the sound.
        top_p: Of the text.
        seed: Determines the samples.
    """

    max_tokens: int
    text_temperature: float | None = None
    audio_temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class SpeechEvent:
    """A part of a reply.

    Attributes:
        text: New text.
        reasoning: New text of thoughts.
        waveform: New samples at the model's rate, float32.
        finish_reason: "" while the reply goes on, then "stop" or "length".
        num_tokens: New tokens of text and new patches of sound.
        num_patches: Patches among them.
    """

    text: str = ""
    reasoning: str = ""
    waveform: np.ndarray | None = None
    finish_reason: str = ""
    num_tokens: int = 0
    num_patches: int = 0


class SpeechModel(Protocol):
    """A model of text and sound. `events` and what it returns are called in one thread."""

    @property
    def sample_rate(self) -> int:
        """Samples per second of the sound that it generates."""

    @property
    def voices(self) -> Sequence[str]:
        """Names of its voices; empty if it has one."""

    def check(self, work: SpeechWork) -> None:
        """Raise UserError if the work can never be done. Must be thread-safe."""

    def prompt_counts(self, work: SpeechWork) -> tuple[int, int]:
        """The number of the prompt's tokens of text, and of its patches of sound. Must be thread-safe."""

    def events(self, work: SpeechWork, sampling: SpeechSampling) -> Iterator[SpeechEvent]:
        """Yield a reply; the last event has a finish reason. Closing the iterator releases its caches."""


@dataclass(frozen=True)
class SpeechRequest(Request):
    """A request of a speech model. Its prompt is the work, not token ids.

    Attributes:
        work: What is to be done.
        sampling: How the reply is sampled.
    """

    work: SpeechWork = field(default_factory=lambda: ChatWork(()))
    sampling: SpeechSampling = field(default_factory=lambda: SpeechSampling(1))


def speech_request(work: SpeechWork, sampling: SpeechSampling) -> SpeechRequest:
    """Return a request with an id of its own."""
    params = SamplingParams(max_tokens=sampling.max_tokens)
    return SpeechRequest(secrets.token_hex(12), (), params, work=work, sampling=sampling)


@dataclass(frozen=True)
class SpeechDelta(Delta):
    """The output of one event of a speech model.

    Attributes:
        reasoning: New text of thoughts.
        waveform: New samples.
        num_tokens: New tokens of text and new patches of sound.
        num_patches: Patches among them.
    """

    reasoning: str = ""
    waveform: np.ndarray | None = None
    num_tokens: int = 0
    num_patches: int = 0

    @property
    def has_output(self) -> bool:
        """Whether the delta adds to the reply."""
        return bool(self.text or self.reasoning) or self.waveform is not None

    @property
    def num_new_tokens(self) -> int:
        """Number of tokens and patches that the delta adds."""
        return self.num_tokens


class SpeechSteps:
    """Replies of a speech model, one event of each in every step.

    Args:
        model: The model.
        most_running: Replies that are generated at once; others wait in order of arrival.

    Attributes:
        num_tokens: Tokens and patches that were generated.
        seconds_heard: Sound in the prompts of all started replies.
        seconds_spoken: Sound that was generated.
    """

    def __init__(self, model: SpeechModel, most_running: int):
        self._model = model
        self._most_running = most_running
        self._waiting: collections.OrderedDict[str, SpeechRequest] = collections.OrderedDict()
        self._running: dict[str, Iterator[SpeechEvent]] = {}
        self.num_tokens = 0
        self.seconds_heard = self.seconds_spoken = 0.0

    @property
    def num_waiting(self) -> int:
        """Replies that have not started."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Replies that are being generated."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether replies are waiting or running."""
        return bool(self._waiting or self._running)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        assert isinstance(request, SpeechRequest), "the backend passes on requests of text"
        self._waiting[request.id] = request

    def abort(self, request_id: str) -> None:
        """Release a request, if it is still waiting or running."""
        self._waiting.pop(request_id, None)
        self._close(request_id)

    def step(self) -> list[Delta]:
        """Start waiting replies, and take one event of each running one."""
        while self._waiting and len(self._running) < self._most_running:
            request_id, request = self._waiting.popitem(last=False)
            self._running[request_id] = self._model.events(request.work, request.sampling)
            self.seconds_heard += seconds_of(request.work)
        return [self._advance(request_id) for request_id in tuple(self._running)]

    def _advance(self, request_id: str) -> Delta:
        try:
            event = next(self._running[request_id], SpeechEvent(finish_reason="stop"))
        except UserError as error:
            self._close(request_id)
            return Delta(request_id, finish_reason="error", error=str(error), is_request_error=True)
        if event.finish_reason:
            self._close(request_id)
        self.num_tokens += event.num_tokens
        if event.waveform is not None:
            self.seconds_spoken += len(event.waveform) / self._model.sample_rate
        return SpeechDelta(
            request_id,
            text=event.text,
            reasoning=event.reasoning,
            finish_reason=event.finish_reason,
            waveform=event.waveform,
            num_tokens=event.num_tokens,
            num_patches=event.num_patches,
        )

    def _close(self, request_id: str) -> None:
        events = self._running.pop(request_id, None)
        if isinstance(events, collections.abc.Generator):
            events.close()


class SpeechBackend(ThreadedBackend):
    """Serve a speech model, and its text model to requests of text only.

    Args:
        model: The model. No other code may use it until `close` returns.
        text: Generates the replies to requests without sound. Its names, tokenizer and positions are the backend's.
        most_running: Replies of the speech model that are generated at once.
    """

    def __init__(self, model: SpeechModel, text: Backend, *, most_running: int = 8):
        self.model = model
        self.model_name = text.model_name
        self.model_aliases = text.model_aliases
        self.tokenizer = text.tokenizer
        self.max_positions = text.max_positions
        self._text = text
        self._speech = SpeechSteps(model, most_running)
        super().__init__(self._speech)

    def check(self, request: Request) -> None:
        """Raise UserError if the request can never run. Thread-safe."""
        if isinstance(request, SpeechRequest):
            self.model.check(request.work)
        else:
            self._text.check(request)

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the reply of the model that the request needs. Closing the iterator aborts the request."""
        return super().generate(request) if isinstance(request, SpeechRequest) else self._text.generate(request)

    def gauges(self) -> BackendGauges:
        """Return the state for /metrics and /health."""
        text, steps = self._text.gauges(), self._speech
        return replace(
            text,
            num_waiting=text.num_waiting + steps.num_waiting,
            num_running=text.num_running + steps.num_running,
            num_new_tokens=text.num_new_tokens + steps.num_tokens,
            seconds_heard=steps.seconds_heard,
            seconds_spoken=steps.seconds_spoken,
            is_healthy=text.is_healthy and self.is_healthy,
        )

    async def close(self) -> None:
        """Stop both threads after their current step."""
        await self._text.close()
        await super().close()


def seconds_of(work: SpeechWork) -> float:
    """The length of all sound in a prompt."""
    match work:
        case TranscribeWork():
            return work.clip.seconds
        case ChatWork():
            parts = [part for message in work.messages for part in message.parts]
            return sum(part.seconds for part in parts if isinstance(part, Clip))
        case SpeakWork():
            return 0.0
