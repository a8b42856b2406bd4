"""Log-mel spectrograms. B waveforms, S samples, L frames, M bands.

A waveform is reflected at both ends, so that frame i is centered on sample i * hop. The bands are triangles on the HTK
mel scale, without normalization, of the magnitudes; the result is their natural logarithm.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SMALLEST = 1e-7  # magnitudes below this are raised to it before the logarithm


class LogMel(nn.Module):
    """Computes log-mel spectrograms.

    Args:
        sample_rate: Samples per second.
        fft_samples: Length of a Fourier transform.
        window_samples: Length of the Hann window, centered in a transform.
        hop_samples: Samples between frames.
        mel_bins: Bands.
        lowest_frequency: Lower edge of the first band, in hertz.
        highest_frequency: Upper edge of the last band, in hertz (None: half the sample rate).
        smallest: Band magnitudes below this are raised to it before the logarithm.
        center: Subtracted from the logarithms.
        scale: Divides them after that.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        fft_samples: int,
        window_samples: int,
        hop_samples: int,
        mel_bins: int,
        lowest_frequency: float = 0.0,
        highest_frequency: float | None = None,
        smallest: float = SMALLEST,
        center: float = 0.0,
        scale: float = 1.0,
    ):
        super().__init__()
        self.fft_samples, self.window_samples, self.hop_samples = fft_samples, window_samples, hop_samples
        self.smallest, self.center, self.scale = smallest, center, scale
        bands = mel_bands(
            sample_rate=sample_rate,
            frequencies=fft_samples // 2 + 1,
            mel_bins=mel_bins,
            lowest=lowest_frequency,
            highest=sample_rate / 2 if highest_frequency is None else highest_frequency,
        )
        self.bands: torch.Tensor
        self.window: torch.Tensor
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)

    def forward(self, waveform_BS: torch.Tensor) -> torch.Tensor:
        """Return the log-mel spectrogram [B, L, M] of waveforms [B, S]; L is S // hop + 1."""
        return self.frames(self.padded(waveform_BS))

    def num_frames(self, samples: int) -> int:
        """Return the number of frames of a waveform."""
        return samples // self.hop_samples + 1

    def padded(self, waveform_BS: torch.Tensor) -> torch.Tensor:
        """Return waveforms with half a transform of reflected samples at both ends."""
        margin = self.fft_samples // 2
        missing = margin + 1 - waveform_BS.shape[1]
        if missing > 0:  # too short to be reflected
            waveform_BS = F.pad(waveform_BS, (0, missing))
        return F.pad(waveform_BS[:, None], (margin, margin), mode="reflect")[:, 0]

    def frames(self, padded_BS: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return frames `start` to `stop` (None: the last) of a result of `padded`, [B, L, M]."""
        last = None if stop is None else (stop - 1) * self.hop_samples + self.fft_samples
        spectrum_BHL = torch.stft(
            padded_BS[:, start * self.hop_samples : last].float(),
            self.fft_samples,
            self.hop_samples,
            self.window_samples,
            self.window,
            center=False,
            return_complex=True,
        )
        mel_BLM = spectrum_BHL.abs().transpose(1, 2) @ self.bands
        return (mel_BLM.clamp(min=self.smallest).log() - self.center) / self.scale


def mel_bands(*, sample_rate: int, frequencies: int, mel_bins: int, lowest: float, highest: float) -> torch.Tensor:
    """Return the weights [frequencies, M] of triangular bands on the HTK mel scale.

    Args:
        sample_rate: Samples per second.
        frequencies: Number of frequencies of a Fourier transform, from 0 to half the sample rate.
        mel_bins: Number of bands.
        lowest: Lower edge of the first band, in hertz.
        highest: Upper edge of the last band, in hertz.
    """
    frequency_H1 = torch.linspace(0, sample_rate / 2, frequencies, dtype=torch.float64)[:, None]
    edges_mel = torch.linspace(_mel(lowest), _mel(highest), mel_bins + 2, dtype=torch.float64)
    edges = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    rising_HM = (frequency_H1 - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling_HM = (edges[2:] - frequency_H1) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising_HM, falling_HM).clamp(min=0).float()


def _mel(frequency: float) -> float:
    return 2595.0 * math.log10(1.0 + frequency / 700.0)
