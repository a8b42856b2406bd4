"""Sequences of text and audio: parts, special tokens, patches, delays, and the interleave of spoken replies.

One position of the backbone holds a text token or a patch of audio frames. A position of a patch has the id of
`<|empty|>` in the text channel, and a position of text has the "no code" ids in the audio channels:

    text     <|sosp|>  <|empty|>  <|empty|>  <|eosp|>   T  h  e
    codes        -      frames     frames        -      -  -  -

A spoken reply alternates segments of five text tokens and five patches. `<|eot|>` ends its text:

    <|sostm|>  5 text  5 patches  5 text  5 patches  2 text <|eot|>  5 patches  3 patches  <|eostm|>

F frames, Q codebooks, P patches, H frames of a patch, T positions, S steps of the patch decoder.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from openmimo.core.errors import DataError
from openmimo.data.tokenizer import SPECIAL_TOKENS, TURN_END, TURN_START, Tokenizer
from openmimo.model.audio.language_config import AudioModelConfig

AUDIO_TOKENS = (
    "<|sosp|>", "<|eosp|>", "<|empty|>", "<|Human|>", "<|SpeechLM|>", "<|sostm|>", "<|eostm|>", "<|eot|>",
)  # fmt: skip
ALL_SPECIAL_TOKENS = SPECIAL_TOKENS + AUDIO_TOKENS
SEGMENT_TOKENS = SEGMENT_PATCHES = 5


@dataclass(frozen=True)
class AudioTokens:
    """Ids of the special tokens, which are those of the tokenizer.

    Attributes:
        empty: Stands for a patch in the text channel.
        start: Begins audio input (`<|sosp|>`).
        end: Ends audio input.
        stream_start: Begins a spoken reply (`<|sostm|>`).
        stream_end: Ends a spoken reply.
        text_end: Ends the text of a spoken reply (`<|eot|>`).
        turn_start: Begins a turn of a conversation.
        turn_end: Ends a turn.
    """

    empty: int
    start: int
    end: int
    stream_start: int
    stream_end: int
    text_end: int
    turn_start: int
    turn_end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "AudioTokens":
        """Read the ids from a tokenizer. Raises DataError with all tokens that it lacks."""
        names = {
            "empty": "<|empty|>", "start": "<|sosp|>", "end": "<|eosp|>", "stream_start": "<|sostm|>",
            "stream_end": "<|eostm|>", "text_end": "<|eot|>", "turn_start": TURN_START, "turn_end": TURN_END,
        }  # fmt: skip
        lacking = [token for token in names.values() if token not in tokenizer.special_tokens]
        if lacking:
            raise DataError(
                f"the tokenizer has no special token {', '.join(lacking)}, which mark audio. Use the tokenizer.json of "
                "MiMo-Audio, or train one with `Tokenizer.train(texts, size, ALL_SPECIAL_TOKENS)` of "
                "openmimo.model.audio.sequence."
            )
        return cls(**{field: tokenizer.special_tokens[token] for field, token in names.items()})


@dataclass(frozen=True)
class TextPart:
    """Text, or its token ids.

    Attributes:
        text: The text; None if the ids are given.
        token_ids: Token ids, instead of `text`.
        is_markup: Whether the text of a special token in `text` becomes that token. Never so for a user's text.
        has_loss: Whether training predicts the tokens.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    is_markup: bool = False
    has_loss: bool = False

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise DataError("a text part has either text or token_ids.")


@dataclass(frozen=True)
class AudioPart:
    """Audio as codes.

    Attributes:
        codes_FQ: Codes, int64. More codebooks than the model has are left out.
        is_bounded: Whether `<|sosp|>` and `<|eosp|>` stand around it.
        has_loss: Whether training predicts the patches.
    """

    codes_FQ: torch.Tensor
    is_bounded: bool = True
    has_loss: bool = False


@dataclass(frozen=True)
class SpeechPart:
    """A spoken reply: text and its audio, interleaved.

    Attributes:
        text: The text.
        codes_FQ: Codes of the audio, int64.
        has_loss: Whether training predicts it.
    """

    text: str
    codes_FQ: torch.Tensor
    has_loss: bool = False


Part = TextPart | AudioPart | SpeechPart


@dataclass(frozen=True)
class AudioSequence:
    """Packed documents of text and patches.

    Attributes:
        text_ids_T: Text token ids, int64; that of `<|empty|>` at patches.
        codes_THQ: Codes, int64; the "no code" ids at text.
        is_patch_T: Whether a position holds a patch.
        has_loss_T: Whether a position is predicted in training.
        document_lengths: Positions of each document.
    """

    text_ids_T: torch.Tensor
    codes_THQ: torch.Tensor
    is_patch_T: torch.Tensor
    has_loss_T: torch.Tensor
    document_lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.text_ids_T)

    def to(self, device: torch.device | str) -> "AudioSequence":
        """Return the sequence on a device."""
        return replace(
            self,
            text_ids_T=self.text_ids_T.to(device),
            codes_THQ=self.codes_THQ.to(device),
            is_patch_T=self.is_patch_T.to(device),
            has_loss_T=self.has_loss_T.to(device),
        )

    def first(self, length: int) -> "AudioSequence":
        """Return the first `length` positions of a single document."""
        assert len(self.document_lengths) == 1
        return AudioSequence(
            self.text_ids_T[:length],
            self.codes_THQ[:length],
            self.is_patch_T[:length],
            self.has_loss_T[:length],
            (min(length, len(self)),),
        )


def packed(sequences: Sequence[AudioSequence]) -> AudioSequence:
    """Join sequences; each document keeps its own context."""
    return AudioSequence(
        torch.cat([sequence.text_ids_T for sequence in sequences]),
        torch.cat([sequence.codes_THQ for sequence in sequences]),
        torch.cat([sequence.is_patch_T for sequence in sequences]),
        torch.cat([sequence.has_loss_T for sequence in sequences]),
        tuple(length for sequence in sequences for length in sequence.document_lengths),
    )


def to_patches(codes_FQ: torch.Tensor, patch_frames: int) -> torch.Tensor:
    """Group frames to patches [P, H, Q]; the last frame is repeated to fill the last patch."""
    missing = -len(codes_FQ) % patch_frames
    if missing:
        codes_FQ = torch.cat([codes_FQ, codes_FQ[-1:].expand(missing, -1)])
    return codes_FQ.reshape(-1, patch_frames, codes_FQ.shape[1])


def delayed(codes_PHQ: torch.Tensor, delays: tuple[int, ...], empty_ids: tuple[int, ...]) -> torch.Tensor:
    """Shift codebook q of each patch by `delays[q]` steps: [P, S, Q], with the "no code" ids before and behind."""
    P, H, Q = codes_PHQ.shape
    empty_Q = torch.tensor(empty_ids, dtype=codes_PHQ.dtype, device=codes_PHQ.device)
    shifted_PSQ = empty_Q.expand(P, H + max(delays), Q).clone()
    for number, delay in enumerate(delays):
        shifted_PSQ[:, delay : delay + H, number] = codes_PHQ[:, :, number]
    return shifted_PSQ


def undelayed(codes_PSQ: torch.Tensor, delays: tuple[int, ...]) -> torch.Tensor:
    """Undo `delayed`: [P, H, Q]."""
    H = codes_PSQ.shape[1] - max(delays)
    return torch.stack([codes_PSQ[:, delay : delay + H, number] for number, delay in enumerate(delays)], dim=2)


class SequenceBuilder:
    """Builds sequences for one model and its tokenizer.

    Attributes:
        tokens: The special ids.

    Raises:
        DataError: The tokenizer lacks a special token, or has more ids than the model.
    """

    def __init__(self, tokenizer: Tokenizer, config: AudioModelConfig):
        self.tokenizer = tokenizer
        self.config = config
        self.tokens = AudioTokens.of(tokenizer)
        if tokenizer.vocab_size > config.backbone.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {config.backbone.vocab_size}."
            )

    def build(self, parts: Iterable[Part]) -> AudioSequence:
        """Return the sequence of one document. Raises DataError if it is empty or a code is out of range."""
        pieces = [piece for part in parts for piece in self._pieces(part)]
        joined = packed(pieces) if pieces else None
        if joined is None or not len(joined):
            raise DataError("the sequence is empty: give text or audio.")
        return replace(joined, document_lengths=(len(joined),))

    def text(self, token_ids: Sequence[int], *, has_loss: bool = False) -> AudioSequence:
        """Return positions of text."""
        T, config = len(token_ids), self.config
        empty_Q = torch.tensor(config.empty_ids)
        return AudioSequence(
            torch.tensor(token_ids, dtype=torch.int64),
            empty_Q.expand(T, config.patch_frames, -1).clone(),
            torch.zeros(T, dtype=torch.bool),
            torch.full((T,), has_loss),
            (T,),
        )

    def patches(self, codes_PHQ: torch.Tensor, *, has_loss: bool = False) -> AudioSequence:
        """Return positions of patches."""
        P = len(codes_PHQ)
        return AudioSequence(
            torch.full((P,), self.tokens.empty),
            codes_PHQ.to(torch.int64),
            torch.ones(P, dtype=torch.bool),
            torch.full((P,), has_loss),
            (P,),
        )

    def patches_of(self, codes_FQ: torch.Tensor) -> torch.Tensor:
        """Return the patches [P, H, Q] of a clip, with the codebooks of the model. Raises DataError."""
        config = self.config
        if codes_FQ.ndim != 2 or codes_FQ.is_floating_point() or codes_FQ.shape[1] < config.num_codebooks:
            raise DataError(
                f"audio codes have the shape {list(codes_FQ.shape)} and dtype {codes_FQ.dtype}; the model needs "
                f"integers [frames, at least {config.num_codebooks} codebooks]."
            )
        if not len(codes_FQ):
            raise DataError("the audio has no frames; it is too short.")
        codes_FQ = codes_FQ[:, : config.num_codebooks].to(device="cpu", dtype=torch.int64)
        highest = codes_FQ.amax(dim=0)
        for number, (most, empty) in enumerate(zip(highest.tolist(), config.empty_ids, strict=True)):
            if most >= empty or int(codes_FQ[:, number].min()) < 0:
                raise DataError(
                    f"codebook {number} of the audio has the code {most}, but the model has {empty} codes there. Use "
                    "the audio tokenizer with which the model was trained."
                )
        return to_patches(codes_FQ, config.patch_frames)

    def speech_segments(self, text: str) -> list[list[int]]:
        """Return the text segments of a spoken reply; `<|eot|>` ends the last one."""
        return _segments(self.tokenizer.encode(text), self.tokens.text_end)

    def _pieces(self, part: Part) -> list[AudioSequence]:
        tokens, has_loss = self.tokens, part.has_loss
        if isinstance(part, TextPart):
            ids = part.token_ids
            if ids is None:
                ids = tuple(self.tokenizer.encode(part.text or "", allow_special=part.is_markup))
            return [self.text(ids, has_loss=has_loss)] if ids else []
        codes_PHQ = self.patches_of(part.codes_FQ)
        if isinstance(part, SpeechPart):
            return self._interleaved(self.speech_segments(part.text), codes_PHQ, has_loss=has_loss)
        patches = self.patches(codes_PHQ, has_loss=has_loss)
        if not part.is_bounded:
            return [patches]
        return [self.text([tokens.start], has_loss=has_loss), patches, self.text([tokens.end], has_loss=has_loss)]

    def _interleaved(
        self, segments: list[list[int]], codes_PHQ: torch.Tensor, *, has_loss: bool
    ) -> list[AudioSequence]:
        pieces = [self.text([self.tokens.stream_start], has_loss=has_loss)]
        clips = codes_PHQ.split(SEGMENT_PATCHES)
        for number in range(max(len(segments), len(clips))):
            if number < len(segments):
                pieces.append(self.text(segments[number], has_loss=has_loss))
            if number < len(clips):
                pieces.append(self.patches(clips[number], has_loss=has_loss))
        return [*pieces, self.text([self.tokens.stream_end], has_loss=has_loss)]


def _segments(token_ids: list[int], text_end: int) -> list[list[int]]:
    """Split text tokens by five; `text_end` is appended to the last segment, which may so have six tokens."""
    firsts = range(0, max(len(token_ids), 1), SEGMENT_TOKENS)
    segments = [token_ids[first : first + SEGMENT_TOKENS] for first in firsts]
    segments[-1] = [*segments[-1], text_end]
    return segments
