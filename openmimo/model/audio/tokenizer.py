"""The audio tokenizer: waveforms to codes and back, whole or streamed. One device.

S samples, F code frames, Q codebooks, L mel frames.
"""

from pathlib import Path

import torch
from torch import nn

from openmimo.core.errors import DataError
from openmimo.model.audio.checkpoint import check_fit, fill, open_folder, save_weights
from openmimo.model.audio.config import AUDIO_TOKENIZER_PRESETS, AudioTokenizerConfig, preset
from openmimo.model.audio.decoder import AudioDecoder, DecoderStream
from openmimo.model.audio.encoder import AudioEncoder
from openmimo.model.audio.mel import LogMel
from openmimo.model.audio.vocoder import VocoderStream
from openmimo.runtime.device import activation_dtype, resolve_device

__all__ = [
    "AUDIO_TOKENIZER_PRESETS", "AudioStream", "AudioTokenizer", "AudioTokenizerConfig", "load_audio_tokenizer",
    "preset", "save_audio_tokenizer",
]  # fmt: skip

# Mel frames that are encoded together, 60 seconds: the segments of the released program, which bound the memory.
SEGMENT_MEL_FRAMES = 6000
WHOLE_FRAMES = 1500  # code frames that are decoded at once, 60 seconds


class AudioTokenizer(nn.Module):
    """Encodes waveforms to codes and decodes codes to waveforms.

    Args:
        config: The shape.
    """

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.config = config
        self.log_mel = _log_mel(config)
        self.encoder = AudioEncoder(config)
        self.decoder = AudioDecoder(config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.log_mel.window.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the layers' weights."""
        return self.encoder.conv1.weight.dtype

    @property
    def has_exact_streams(self) -> bool:
        """Whether a stream gives the samples of `decode`: decoder and vocoder do not depend on all later codes."""
        stacks = (self.config.decoder, self.config.vocoder)
        is_local = all(stack.right_positions is not None for stack in stacks)
        return is_local and self.config.decoder_norm == "frame"

    def num_frames(self, samples: int) -> int:
        """Return the number of code frames of a waveform: that of its duration, and at most one more."""
        whole, rest = divmod(self.log_mel.num_frames(samples), SEGMENT_MEL_FRAMES)
        frames = whole * self.config.frames_of_mel(SEGMENT_MEL_FRAMES)
        return frames + (self.config.frames_of_mel(rest) if rest else 0)

    @torch.no_grad()
    def encode(self, waveform_S: torch.Tensor, codebooks: int | None = None) -> torch.Tensor:
        """Return the codes int64 [F, Q] of a mono waveform at the config's sample rate, on the tokenizer's device.

        Segments of 60 seconds are encoded one at a time and independently.

        Args:
            waveform_S: Floating-point samples, usually between -1 and 1.
            codebooks: Number of codebooks, Q (None: all).

        Raises:
            DataError: The waveform is empty, not mono, not floating-point or not finite; there are fewer codebooks.
        """
        check_waveform(waveform_S, self.config)
        if codebooks is not None and not 1 <= codebooks <= self.config.num_codebooks:
            raise DataError(f"codebooks is {codebooks}; this tokenizer has 1 to {self.config.num_codebooks}.")
        padded = self.log_mel.padded(waveform_S.to(self.device, torch.float32)[None])
        num_frames = self.log_mel.num_frames(len(waveform_S))
        codes = []
        for start in range(0, num_frames, SEGMENT_MEL_FRAMES):
            mel_BLM = self.log_mel.frames(padded, start, min(start + SEGMENT_MEL_FRAMES, num_frames))
            codes.append(self.encoder.quantizer.encode(self.encoder(mel_BLM.to(self.dtype))[0], codebooks))
        return torch.cat(codes)

    @torch.no_grad()
    def decode(self, codes_FQ: torch.Tensor) -> torch.Tensor:
        """Return the waveform float32 [F * samples_per_frame] of codes of the first Q codebooks.

        Long sequences are decoded as a stream, in bounded memory, if streams are exact.

        Raises:
            DataError: The codes have a wrong shape or dtype, or are outside their codebooks.
        """
        check_codes(codes_FQ, self.config)
        if not len(codes_FQ):
            return torch.empty(0, device=self.device)
        if len(codes_FQ) > WHOLE_FRAMES and self.has_exact_streams:
            stream = self.stream()
            parts = [stream.push(part) for part in codes_FQ.split(WHOLE_FRAMES)]
            return torch.cat([*parts, stream.finish()])
        return self.decoder(self._vectors(codes_FQ))[0].float()

    def stream(self) -> "AudioStream":
        """Return a decoder of codes that arrive in parts.

        Raises:
            ConfigError: Decoder or vocoder see all later positions.
        """
        return AudioStream(self)

    def _vectors(self, codes_FQ: torch.Tensor) -> torch.Tensor:
        return self.encoder.quantizer.decode(codes_FQ.to(self.device))[None].to(self.dtype)


class AudioStream:
    """Decodes codes that arrive in parts. The parts of the waveform join to that of `AudioTokenizer.decode`.

    With `decoder_norm` "sequence", as in the released tokenizer, they do not: `decode` normalizes by statistics of the
    whole sequence, and a stream by those of the sequence so far.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: AudioTokenizer):
        self._tokenizer = tokenizer
        self._decoder = DecoderStream(tokenizer.decoder)
        self._vocoder = VocoderStream(tokenizer.decoder.vocoder)
        self._num_codebooks: int | None = None
        self._finished = False

    @torch.no_grad()
    def push(self, codes_FQ: torch.Tensor) -> torch.Tensor:
        """Return the samples that the next codes complete, float32 [S]; there may be none.

        Raises:
            DataError: The codes are invalid, have another number of codebooks than before, or follow the end.
        """
        if self._finished:
            raise DataError("the stream is finished; open another with tokenizer.stream().")
        check_codes(codes_FQ, self._tokenizer.config)
        if self._num_codebooks not in (None, codes_FQ.shape[1]):
            raise DataError(
                f"the codes have {codes_FQ.shape[1]} codebooks, but those before had {self._num_codebooks}."
            )
        self._num_codebooks = codes_FQ.shape[1]
        if not len(codes_FQ):
            return torch.empty(0, device=self._tokenizer.device)
        return self._samples(self._tokenizer._vectors(codes_FQ), last=False)

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """Return the remaining samples, float32 [S]. Raises DataError if the stream is finished."""
        if self._finished:
            raise DataError("the stream is finished; open another with tokenizer.stream().")
        self._finished = True
        tokenizer = self._tokenizer
        nothing = torch.empty(1, 0, tokenizer.config.decoder.dim, dtype=tokenizer.dtype, device=tokenizer.device)
        return self._samples(nothing, last=True)

    def _samples(self, x_BFD: torch.Tensor, *, last: bool) -> torch.Tensor:
        return self._vocoder.push(self._decoder.push(x_BFD, last=last), last=last).float()


def _log_mel(config: AudioTokenizerConfig) -> LogMel:
    return LogMel(
        sample_rate=config.sample_rate,
        fft_samples=config.fft_samples,
        window_samples=config.window_samples,
        hop_samples=config.hop_samples,
        mel_bins=config.mel_bins,
        lowest_frequency=config.lowest_frequency,
        highest_frequency=config.highest_frequency,
        smallest=config.mel_floor,
        center=config.mel_center,
        scale=config.mel_scale,
    )


def check_waveform(waveform_S: torch.Tensor, config: AudioTokenizerConfig) -> None:
    """Raise DataError unless this is a mono waveform of finite floating-point samples."""
    if not isinstance(waveform_S, torch.Tensor):
        raise DataError(
            f"the waveform is of type {type(waveform_S).__name__}; give a torch.Tensor of float32 samples, such as "
            "torch.from_numpy(samples)."
        )
    if not waveform_S.is_floating_point():
        raise DataError(
            f"the waveform has dtype {waveform_S.dtype}; give float32 samples between -1 and 1 (16-bit integers "
            "divided by 32768)."
        )
    if waveform_S.ndim != 1:
        raise DataError(
            f"the waveform has shape {list(waveform_S.shape)}; give one channel, of shape [samples]. The mean over the "
            "channels of stereo audio is mono."
        )
    if not len(waveform_S):
        raise DataError("the waveform is empty; give at least one sample.")
    finite = waveform_S.isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise DataError(
            f"the waveform is not finite: sample {first} ({first / config.sample_rate:.3f} seconds at "
            f"{config.sample_rate} Hz) is {waveform_S[first].item()}."
        )


def check_codes(codes_FQ: torch.Tensor, config: AudioTokenizerConfig) -> None:
    """Raise DataError unless these are codes [F, Q] of the first Q codebooks."""
    if not isinstance(codes_FQ, torch.Tensor) or codes_FQ.dtype != torch.int64 or codes_FQ.ndim != 2:
        found = (
            f"{codes_FQ.dtype} {list(codes_FQ.shape)}"
            if isinstance(codes_FQ, torch.Tensor)
            else type(codes_FQ).__name__
        )
        raise DataError(f"the codes are {found}; give a torch.int64 tensor of shape [frames, codebooks].")
    if not 1 <= codes_FQ.shape[1] <= config.num_codebooks:
        raise DataError(f"the codes have {codes_FQ.shape[1]} codebooks; this tokenizer has {config.num_codebooks}.")
    sizes = torch.tensor(config.codebook_sizes[: codes_FQ.shape[1]], device=codes_FQ.device)
    wrong = ((codes_FQ < 0) | (codes_FQ >= sizes)).nonzero()
    if len(wrong):
        frame, codebook = wrong[0].tolist()
        raise DataError(
            f"code {codes_FQ[frame, codebook].item()} of frame {frame} is outside codebook {codebook}, which has "
            f"{config.codebook_sizes[codebook]} entries."
        )


def load_audio_tokenizer(path: str | Path, *, device: str = "cpu", dtype: str = "float32") -> AudioTokenizer:
    """Load a tokenizer folder, ours or a released one.

    Args:
        path: The folder, with `config.json` and `*.safetensors`.
        device: Device of the weights.
        dtype: Dtype of the layers; codebooks and mel bands remain float32.

    Raises:
        CheckpointError: Files are missing or damaged, or the weights do not fit the config.
        ConfigError: The config is invalid.
    """
    chosen_device = resolve_device(device)
    stored = open_folder(path)
    with torch.device("meta"):  # no memory before the weights are known to have the config's shapes
        tokenizer = AudioTokenizer(stored.config)
    check_fit(tokenizer, stored)
    for parameter in tokenizer.parameters():
        parameter.data = parameter.data.to(activation_dtype(dtype, chosen_device))
    tokenizer.to_empty(device=chosen_device)
    tokenizer.log_mel = _log_mel(stored.config).to(chosen_device)  # its buffers are not stored
    fill(tokenizer, stored)
    return tokenizer.eval()


def save_audio_tokenizer(tokenizer: AudioTokenizer, path: str | Path) -> None:
    """Write a tokenizer folder with the names and the layout of the released one. The write is atomic.

    Raises:
        CheckpointError: The folder has other files, or cannot be written.
    """
    save_weights(tokenizer, tokenizer.config, path)
