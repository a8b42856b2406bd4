"""Generation with an audio language model: text and audio in, text, audio or both out, as a stream.

Each generation has caches of its own: pages of the backbone's keys and values, the steps of the patch decoder, and the
stream of the audio tokenizer's decoder. Several may be in progress, also in several threads. A generation that is not
read to its end needs no clean-up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch

from openmimo.core.errors import DataError, UserError
from openmimo.core.fields import Bounds, NonNegativeFloat, PositiveInt, check_fields
from openmimo.data.audio.corpus import SPEAK, TRANSCRIBE
from openmimo.data.audio.files import resample
from openmimo.data.tokenizer import THINK_END, StreamDecoder, Tokenizer
from openmimo.engine.audio.cache import BackboneCache
from openmimo.engine.audio.form import SpeechForm
from openmimo.engine.sampler import uniform
from openmimo.kernels.operations import draw_tokens
from openmimo.model.audio.context import StepContext
from openmimo.model.audio.conversation import (
    STYLE,
    VOICE,
    conversation_parts,
    reply_parts,
)
from openmimo.model.audio.language import load_audio_model
from openmimo.model.audio.sequence import AudioPart, AudioSequence, Part, SequenceBuilder, SpeechPart, TextPart
from openmimo.model.audio.tokenizer import load_audio_tokenizer
from openmimo.model.hf import CODEC_FOLDER

_DRAWS_PER_POSITION = 1 << 10
Waveform = np.ndarray[Any, np.dtype[np.float32]]


class CodecStream(Protocol):
    """Decodes codes in the order of time."""

    def push(self, codes_FQ: torch.Tensor) -> torch.Tensor:
        """Return the samples that new frames complete; may be none."""
        ...

    def finish(self) -> torch.Tensor:
        """Return the rest of the samples."""
        ...


class Codec(Protocol):
    """The audio tokenizer, as this engine uses it."""

    @property
    def config(self) -> Any:
        """Its config, with `sample_rate` and `codebook_sizes`."""
        ...

    def encode(self, waveform_S: torch.Tensor) -> torch.Tensor:
        """Return codes [F, Q]."""
        ...

    def stream(self) -> CodecStream:
        """Begin to decode."""
        ...


@dataclass(frozen=True)
class AudioParams:
    """Settings of one generation.

    Attributes:
        output: "text"; "audio" (a spoken reply, without its text); or "interleaved" (with its text).
        max_tokens: The most new positions: text tokens and patches together.
        text_temperature: Temperature of the text channel (0: the most likely token).
        audio_temperature: Temperature of the codes (0: the most likely ones).
        top_p: Share of the probability from which codes and text are drawn.
        seed: Seed of the draws. Equal seeds give equal replies.
        thinking: Whether the model thinks first. False writes empty think tags, and None writes none, as in the spoken
            dialogues of the released model.
    """

    output: Literal["text", "audio", "interleaved"] = "text"
    max_tokens: PositiveInt = 512
    text_temperature: NonNegativeFloat = 0.0
    audio_temperature: NonNegativeFloat = 0.9
    top_p: Annotated[float, Bounds(above=0, most=1)] = 0.95
    seed: int = 0
    thinking: bool | None = False

    def __post_init__(self) -> None:
        check_fields(self, "audio params")


@dataclass(frozen=True)
class AudioEvent:
    """A piece of a reply.

    Attributes:
        text: New text, or None.
        waveform: New samples at the engine's `sample_rate`, float32; or None.
        reasoning: New text of the model's thoughts, or None.
        finish_reason: "stop" or "length" in the last event, else None.
        num_tokens: Ids of the text channel since the event before, those of patches and of the end included.
        num_patches: Patches among them.
    """

    text: str | None = None
    waveform: Waveform | None = None
    reasoning: str | None = None
    finish_reason: str | None = None
    num_tokens: int = 0
    num_patches: int = 0


class AudioEngine:
    """A loaded model with its tokenizers.

    Args:
        path: Folder of the model.
        codec_path: Folder of the audio tokenizer (None: `path`/codec).
        device: A torch device, or "auto".
        dtype: Dtype of the weights.
        codec: An audio tokenizer that is loaded already, instead of `codec_path`.

    Attributes:
        model: The model.
        tokenizer: The text tokenizer.
        codec: The audio tokenizer.

    Raises:
        UserError: A folder is missing or not valid, or the tokenizer has no special tokens of audio.
    """

    def __init__(
        self,
        path: str | Path,
        codec_path: str | Path | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        codec: Codec | None = None,
    ):
        self.model = load_audio_model(path, dtype=dtype, device=device)
        self.tokenizer = Tokenizer.load(path)
        self.builder = SequenceBuilder(self.tokenizer, self.model.audio)
        self.codec = codec or _load_codec(Path(path) / CODEC_FOLDER if codec_path is None else Path(codec_path), device)
        self._check_codec()

    @property
    def sample_rate(self) -> int:
        """Samples per second of the waveforms."""
        return int(self.codec.config.sample_rate)

    def generate(
        self, prompt: Sequence[Mapping[str, Any]] | Sequence[Part], params: AudioParams | None = None
    ) -> Iterator[AudioEvent]:
        """Generate a reply.

        Args:
            prompt: Messages (`openmimo.model.audio.conversation`), where the value of `audio` is a waveform at
                `sample_rate` or codes; or parts, which the model continues as they are.
            params: The settings.

        Raises:
            UserError: The prompt is not valid or too long. Raised before the first event.
        """
        params = params or AudioParams()
        if not isinstance(prompt, Sequence) or not prompt:
            raise DataError("the prompt is empty: give messages or parts.")
        if isinstance(prompt[0], (TextPart, AudioPart, SpeechPart)):
            parts: list[Part] = list(prompt)  # type: ignore[arg-type]
        else:
            parts = conversation_parts(prompt, self.codes_of)  # type: ignore[arg-type]
            parts += reply_parts(thinking=params.thinking, is_spoken=params.output != "text")
        return self._events(parts, params, None)

    def transcribe(self, waveform: Waveform | torch.Tensor, sample_rate: int, *, max_tokens: int = 512) -> str:
        """Return the text of speech, cut at `max_tokens`."""
        events = self.transcription(waveform, sample_rate, AudioParams(max_tokens=max_tokens))
        return "".join(event.text or "" for event in events).strip()

    def transcription(
        self, waveform: Waveform | torch.Tensor, sample_rate: int, params: AudioParams | None = None
    ) -> Iterator[AudioEvent]:
        """Write down what is said; `output` of `params` is not used."""
        audio = {"waveform": waveform, "sample_rate": sample_rate}
        content = [{"type": "text", "text": TRANSCRIBE}, {"type": "audio", "audio": audio}]
        return self.generate([{"role": "user", "content": content}], replace(params or AudioParams(), output="text"))

    def speak(
        self,
        text: str,
        instruction: str | None = None,
        voice: Waveform | torch.Tensor | None = None,
        *,
        params: AudioParams | None = None,
    ) -> Iterator[Waveform]:
        """Speak a text; yields waveforms at `sample_rate`, as `speech` does without its finish reason."""
        events = self.speech(text, instruction, voice, params=params)
        return (event.waveform for event in events if event.waveform is not None)

    def speech(
        self,
        text: str,
        instruction: str | None = None,
        voice: Waveform | torch.Tensor | None = None,
        *,
        params: AudioParams | None = None,
    ) -> Iterator[AudioEvent]:
        """Speak a text. The text channel is given; only the audio is generated.

        Args:
            text: The text.
            instruction: The style of the speech.
            voice: Speech at `sample_rate` whose voice the reply takes.
            params: Settings; `output` is not used.

        Raises:
            UserError: There is no text, or its speech cannot fit. Raised before the first event.
        """
        if not text.strip():
            raise DataError("there is no text to speak.")
        params = replace(params or AudioParams(max_tokens=2048), output="audio")
        parts = conversation_parts(speech_request(text, instruction, voice), self.codes_of)
        parts += reply_parts(thinking=params.thinking, is_spoken=True)
        return self._events(parts, params, self.builder.speech_segments(text))

    def chat(self, messages: Sequence[Mapping[str, Any]], params: AudioParams | None = None) -> Iterator[AudioEvent]:
        """Reply to a conversation with speech and its text, or as `params` say."""
        return self.generate(messages, params or AudioParams(output="interleaved"))

    def codes_of(self, audio: Any) -> torch.Tensor:
        """Return the codes of a waveform [samples] at `sample_rate`, or of an object with both; or the given codes.

        Raises:
            DataError: It is none of these.
        """
        if isinstance(audio, torch.Tensor) and not audio.is_floating_point():
            return audio
        rate: Any = self.sample_rate
        if isinstance(audio, Mapping):
            audio, rate = audio.get("waveform"), audio.get("sample_rate")
        if not isinstance(audio, (np.ndarray, torch.Tensor)) or not isinstance(rate, int):
            raise DataError('audio must be a waveform, or an object with "waveform" and "sample_rate".')
        waveform = torch.as_tensor(audio)
        if waveform.ndim != 1 or not waveform.is_floating_point():
            raise DataError(
                f"a waveform has the shape {list(waveform.shape)} and dtype {waveform.dtype}; it must be floats "
                "[samples] of one channel."
            )
        if rate != self.sample_rate:
            waveform = torch.from_numpy(resample(waveform.float().cpu().numpy(), rate, self.sample_rate))
        return self.codec.encode(waveform.float())

    def _check_codec(self) -> None:
        sizes, needed = tuple(self.codec.config.codebook_sizes), self.model.audio.empty_ids
        if len(sizes) < len(needed) or any(size > most for size, most in zip(sizes, needed, strict=False)):
            raise UserError(
                f"the audio tokenizer has codebooks of {list(sizes)} codes, but the model was made for {list(needed)}."
            )

    def _events(self, parts: list[Part], params: AudioParams, given: list[list[int]] | None) -> Iterator[AudioEvent]:
        prompt = self.builder.build(parts)
        most = self.model.config.max_positions
        if len(prompt) >= most:
            raise UserError(
                f"the prompt has {len(prompt)} positions, but the model only {most}. Give shorter audio or text."
            )
        most_new = min(params.max_tokens, most - len(prompt))
        if given is not None and (needed := positions_of_speech(given)) > most_new:
            limit = "max_tokens" if most_new == params.max_tokens else f"the model's {most} positions"
            raise UserError(
                f"the speech of this text needs about {needed} tokens and patches, but {limit} leaves room for "
                f"{most_new}. Give a shorter text{' or a higher limit' if most_new == params.max_tokens else ''}."
            )
        return _Generation(self, prompt, params, given).events(most_new)


def positions_of_speech(segments: list[list[int]]) -> int:
    """Return how many positions the speech of a text needs at least: as many patches as tokens, and the end."""
    return 2 * sum(map(len, segments)) + 1


def voice_turn(voice: Any) -> dict[str, Any]:
    """Return the message that gives the voice of the replies; `voice` is audio in the form that `codes_of` reads."""
    return {"role": "system", "content": [{"type": "text", "text": VOICE}, {"type": "audio", "audio": voice}]}


def speech_request(text: str, instruction: str | None, voice: Any) -> list[dict[str, Any]]:
    """Return the messages that ask for speech; `voice` is audio in the form that `codes_of` reads, or None."""
    messages: list[dict[str, Any]] = []
    if voice is not None:
        messages.append(voice_turn(voice))
    elif instruction is not None:
        messages.append({"role": "system", "content": STYLE})
    style = "" if instruction is None else f"({instruction})"
    return [*messages, {"role": "user", "content": f"{SPEAK}{text}{style}"}]


class _Generation:
    """The state of one generation: caches, the form of a spoken reply, and the decoders of text and audio."""

    def __init__(self, engine: AudioEngine, prompt: AudioSequence, params: AudioParams, given: list[list[int]] | None):
        self._model, self._builder, self._params = engine.model, engine.builder, params
        self._tokens, self._prompt, self._given = engine.builder.tokens, prompt, given
        self._steps = StepContext(self._model.audio.local_steps, self._model.device)
        self._text = StreamDecoder(engine.tokenizer)
        self._codec = engine.codec
        self._audio: CodecStream | None = None
        self._is_reasoning = bool(params.thinking)
        self._think_end = engine.tokenizer.special_tokens.get(THINK_END)
        self._form: SpeechForm | None = None
        self._position = 0
        self._num_tokens = self._num_patches = 0
        if int(prompt.text_ids_T[-1]) == self._tokens.stream_start:
            self._form = SpeechForm(self._tokens, given)
        tokens = self._tokens
        self._stops = {tokens.turn_end, tokens.stream_end, *engine.tokenizer.eos_token_ids}
        audio = [tokens.empty, tokens.start, tokens.end, tokens.stream_start]
        self._never_text = torch.tensor([*audio, tokens.stream_end], device=self._model.device)
        self._never_spoken = torch.tensor([*audio, *self._stops], device=self._model.device)
        self._continues_audio = self._form is None and params.output == "audio" and not params.thinking

    def events(self, max_tokens: int) -> Iterator[AudioEvent]:
        """Yield the reply."""
        for event in self._reply(max_tokens):
            counted = replace(event, num_tokens=self._num_tokens, num_patches=self._num_patches)
            self._num_tokens = self._num_patches = 0
            yield counted

    def _reply(self, max_tokens: int) -> Iterator[AudioEvent]:
        cache = BackboneCache(self._model, len(self._prompt) + max_tokens)
        state_D = self._read(cache, self._prompt)
        for _ in range(max_tokens):
            self._position += 1
            token = self._next_id(state_D)
            self._num_tokens += 1
            if token in self._stops or (self._continues_audio and token == self._tokens.end):
                yield from self._last("stop")
                return
            if token == self._tokens.empty:
                self._num_patches += 1
                codes_HQ = self._next_patch(state_D)
                added = self._builder.patches(codes_HQ[None])
                yield from self._heard(codes_HQ)
            else:
                added = self._builder.text([token])
                yield from self._said(token)
            self._advance(token)
            state_D = self._read(cache, added)
        yield from self._last("length")

    @torch.inference_mode()
    def _read(self, cache: BackboneCache, added: AudioSequence) -> torch.Tensor:
        return cache.run(self._model.embed(added.to(self._model.device)))[-1]

    @torch.inference_mode()
    def _next_id(self, state_D: torch.Tensor) -> int:
        allowed = self._allowed()
        if allowed is not None and len(allowed) == 1:
            return allowed[0]
        logits_V = self._model.head(state_D[None])[0]
        if allowed is not None:
            place = _draw(logits_V[list(allowed)], self._params.text_temperature, self._params.top_p, self._number(0))
            return allowed[place]
        if self._form is not None or self._params.output == "text":
            empty = logits_V[self._tokens.empty].clone()
            logits_V[self._never_spoken if self._form is not None else self._never_text] = -torch.inf
            if self._form is not None and self._form.allows_patch:
                logits_V[self._tokens.empty] = empty
        logits_V[self._builder.tokenizer.vocab_size :] = -torch.inf
        return _draw(logits_V, self._params.text_temperature, self._params.top_p, self._number(0))

    def _allowed(self) -> tuple[int, ...] | None:
        if self._form is not None:
            return self._form.allowed()
        return (self._tokens.empty, self._tokens.end) if self._continues_audio else None

    @torch.inference_mode()
    def _next_patch(self, state_D: torch.Tensor) -> torch.Tensor:
        config, params = self._model.audio, self._params

        def choose(logits_V: torch.Tensor, codebook: int, frame: int) -> int:
            number = self._number(1 + frame * config.num_codebooks + codebook)
            return _draw(logits_V, params.audio_temperature, params.top_p, number)

        return self._model.generate_patch(state_D, self._steps, choose)

    def _number(self, draw: int) -> float:
        return uniform(self._params.seed, self._position * _DRAWS_PER_POSITION + draw)

    def _advance(self, token: int) -> None:
        if self._form is not None:
            self._form.push(token)
        elif token == self._tokens.stream_start:
            self._form = SpeechForm(self._tokens, self._given)

    def _said(self, token: int) -> Iterator[AudioEvent]:
        if token == self._think_end and self._is_reasoning:
            yield from self._written(self._text.flush())
            self._is_reasoning = False
        else:
            yield from self._written(self._text.push([token]))

    def _written(self, text: str) -> Iterator[AudioEvent]:
        if text and self._is_reasoning:
            yield AudioEvent(reasoning=text)
        elif text and self._params.output != "audio":
            yield AudioEvent(text=text)

    def _heard(self, codes_HQ: torch.Tensor) -> Iterator[AudioEvent]:
        if self._audio is None:
            self._audio = self._codec.stream()
        yield from _samples(self._audio.push(codes_HQ))

    def _last(self, reason: str) -> Iterator[AudioEvent]:
        if self._audio is not None:
            yield from _samples(self._audio.finish())
        yield from self._written(self._text.flush())
        yield AudioEvent(finish_reason=reason)


def _samples(waveform: torch.Tensor) -> Iterator[AudioEvent]:
    if len(waveform):
        yield AudioEvent(waveform=waveform.detach().float().cpu().numpy())


def _draw(logits_V: torch.Tensor, temperature: float, top_p: float, number: float) -> int:
    """Draw an index; the most likely one at temperature 0."""
    if temperature == 0.0:
        return int(logits_V.argmax())
    numbers_51 = torch.tensor([temperature, top_p, torch.inf, 0.0, 1.0], dtype=torch.float64)[:, None]
    uniform_1 = torch.tensor([number], dtype=torch.float64)
    device = logits_V.device
    return int(draw_tokens(logits_V[None], numbers_51.to(device), uniform_1.to(device), has_filters=top_p < 1.0))


def _load_codec(folder: Path, device: str) -> Codec:
    if not folder.is_dir():
        raise UserError(f"there is no audio tokenizer in {folder}; give its folder as codec_path.")
    return load_audio_tokenizer(str(folder), device=device)
