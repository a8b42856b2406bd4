"""The vocoder (after Vocos, arXiv 2306.00814): mel frames to the short-time spectrum, whose inverse is the waveform.

B sequences, L mel frames, M bands, D dim, H frequencies, S samples.
"""

import torch
import torch.nn.functional as F
from torch import nn

from openmimo.model.audio.attention import AudioLayer, LayerStream, rotation
from openmimo.model.audio.config import AudioTokenizerConfig
from openmimo.model.layers import Linear

_LARGEST_MAGNITUDE = 100.0


class InverseTransform(nn.Module):
    """Inverse short-time Fourier transform with "same" padding: `hop` samples for each frame.

    Frame i covers the samples from i * hop - margin on, where margin is (fft - hop) / 2. Windowed frames are added and
    divided by the sum of the squared windows; samples before 0 and behind the last hop are dropped.

    Args:
        fft_samples: Length of a transform and of the Hann window.
        hop_samples: Samples between frames.
    """

    def __init__(self, fft_samples: int, hop_samples: int):
        super().__init__()
        self.fft_samples, self.hop_samples = fft_samples, hop_samples
        self.margin = (fft_samples - hop_samples) // 2
        self.window: torch.Tensor
        self.register_buffer("window", torch.hann_window(fft_samples))

    def forward(self, spectrum_BLH: torch.Tensor) -> torch.Tensor:
        """Return waveforms [B, L * hop] of complex spectra."""
        added_BS, weight_S = self.overlap_add(spectrum_BLH)
        stop = self.margin + spectrum_BLH.shape[1] * self.hop_samples
        return added_BS[:, self.margin : stop] / weight_S[self.margin : stop]

    def overlap_add(self, spectrum_BLH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of windowed frames, [B, (L - 1) * hop + fft], and of squared windows, without batch axis."""
        frames_BLS = torch.fft.irfft(spectrum_BLH, self.fft_samples, dim=2) * self.window
        squares_1LS = self.window.pow(2).expand(1, frames_BLS.shape[1], -1)
        return self._fold(frames_BLS), self._fold(squares_1LS)[0]

    def _fold(self, frames_BLS: torch.Tensor) -> torch.Tensor:
        samples = (frames_BLS.shape[1] - 1) * self.hop_samples + self.fft_samples
        folded = F.fold(
            frames_BLS.transpose(1, 2), (1, samples), (1, self.fft_samples), stride=(1, self.hop_samples)
        )  # fmt: skip
        return folded[:, 0, 0]


class SpectrumHead(nn.Module):
    """Predicts logarithm of magnitude, and phase, of each frequency; computes the waveform.

    Args:
        config: The tokenizer's shape.
    """

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.out = Linear(config.vocoder.dim, config.fft_samples + 2)
        self.istft = InverseTransform(config.fft_samples, config.hop_samples)

    def spectrum(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Return the complex spectrum [B, L, H]."""
        magnitude, phase = self.out(x_BLD).float().chunk(2, dim=2)
        return torch.polar(magnitude.exp().clamp(max=_LARGEST_MAGNITUDE), phase)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Return waveforms [B, S] of states."""
        return self.istft(self.spectrum(x_BLD))


class Vocoder(nn.Module):
    """Attention layers with a local window, and the spectrum head.

    Args:
        config: The tokenizer's shape.
    """

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.config = config
        stack = config.vocoder
        self.embeddings = Linear(config.mel_bins, stack.dim, bias=False)
        self.layers = nn.ModuleList(AudioLayer(stack) for _ in range(stack.num_layers))
        self.layer_norm = nn.LayerNorm(stack.dim)
        self.head = SpectrumHead(config)

    def forward(self, mel_BLM: torch.Tensor) -> torch.Tensor:
        """Return waveforms [B, L * hop] of mel spectrograms. Differentiable."""
        x_BLD = self.embeddings(mel_BLM)
        turn = rotation(self.config.vocoder, self.config.rope_theta, range(x_BLD.shape[1]), x_BLD)
        for layer in self.layers:
            x_BLD = layer(x_BLD, turn)
        return self.head(self.layer_norm(x_BLD))


class VocoderStream:
    """The vocoder of one stream. Samples that a later frame still changes are held back.

    Args:
        vocoder: The vocoder.

    Raises:
        ConfigError: The vocoder sees all later frames.
    """

    def __init__(self, vocoder: Vocoder):
        self._vocoder = vocoder
        self._layers = LayerStream(vocoder.layers, vocoder.config.vocoder, vocoder.config.rope_theta)
        self._skip = vocoder.head.istft.margin  # samples before the start of the waveform, still to be dropped
        self._sums = self._weights = torch.empty(0)

    def push(self, mel_BLM: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """Return the samples [S] that the next mel frames [1, L, M] complete. With `last`, all samples are complete."""
        vocoder, transform = self._vocoder, self._vocoder.head.istft
        x_BLD = self._layers.push(vocoder.embeddings(mel_BLM), last=last)
        if x_BLD.shape[1]:
            sums_BS, weights = transform.overlap_add(vocoder.head.spectrum(vocoder.layer_norm(x_BLD)))
            self._sums = _added(self._sums, sums_BS[0])
            self._weights = _added(self._weights, weights)
        # After the last frame, the window reaches `margin` samples behind the waveform.
        held = transform.margin if last else transform.fft_samples - transform.hop_samples
        done = max(0, len(self._sums) - held)
        first = min(self._skip, done)
        samples = self._sums[first:done] / self._weights[first:done]
        self._sums, self._weights, self._skip = self._sums[done:], self._weights[done:], self._skip - first
        return samples


def _added(tail: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return `new`, to whose start the overlapping `tail` is added."""
    if not len(tail):
        return new
    return torch.cat([tail + new[: len(tail)], new[len(tail) :]])
