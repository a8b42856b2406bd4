"""Discriminators of waveforms: several periods (HiFi-GAN, arXiv 2010.05646) and several spectra (arXiv 2210.13438).

B waveforms, S samples, C channels, H frequencies, L frames.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from openmimo.train.audio.tokenizer.config import DiscriminatorConfig
from openmimo.train.audio.tokenizer.losses import Features

_SLOPE = 0.1


class PeriodDiscriminator(nn.Module):
    """Sees a waveform as an image whose rows have `period` samples.

    Args:
        period: Samples of a row.
        channels: Channels of the convolutions in order.
    """

    def __init__(self, period: int, channels: list[int]):
        super().__init__()
        self.period = period
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, (5, 1), (3, 1), padding=(2, 0)))
            for before, after in pairwise([1, *channels])
        )
        self.judge = spectral_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveform_BS: torch.Tensor) -> Features:
        """Return the features of each convolution, and the judgments."""
        padded = F.pad(waveform_BS, (0, -waveform_BS.shape[1] % self.period))
        return _features(padded.unflatten(1, (-1, self.period))[:, None], self.layers, self.judge)


class SpectrumDiscriminator(nn.Module):
    """Sees real and imaginary part of a short-time spectrum.

    Args:
        fft_samples: Length of a transform; the hop is a quarter.
        channels: Channels of the convolutions in order.
    """

    def __init__(self, fft_samples: int, channels: list[int]):
        super().__init__()
        self.fft_samples = fft_samples
        self.window: torch.Tensor
        self.register_buffer("window", torch.hann_window(fft_samples), persistent=False)
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, (3, 9), (1, 1 if index == 0 else 2), padding=(1, 4)))
            for index, (before, after) in enumerate(pairwise([2, *channels]))
        )
        self.judge = spectral_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, waveform_BS: torch.Tensor) -> Features:
        """Return the features of each convolution, and the judgments."""
        spectrum_BHL = torch.stft(
            waveform_BS,
            self.fft_samples,
            self.fft_samples // 4,
            window=self.window,
            normalized=True,
            return_complex=True,
        )
        image_BCLH = torch.view_as_real(spectrum_BHL).permute(0, 3, 2, 1)
        return _features(image_BCLH, self.layers, self.judge)


def _features(x: torch.Tensor, layers: nn.ModuleList, judge: nn.Module) -> Features:
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), _SLOPE)
        features.append(x)
    return [*features, judge(x)]


class Discriminators(nn.Module):
    """All discriminators of a run.

    Args:
        config: Their shape.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        period_channels = _doubled(config, 4)
        spectrum_channels = _doubled(config, 3)
        self.members = nn.ModuleList(
            [PeriodDiscriminator(period, period_channels) for period in config.periods]
            + [SpectrumDiscriminator(samples, spectrum_channels) for samples in config.stft_samples]
        )

    def forward(self, waveform_BS: torch.Tensor) -> list[Features]:
        """Return the features of each discriminator."""
        return [member(waveform_BS) for member in self.members]


def _doubled(config: DiscriminatorConfig, count: int) -> list[int]:
    return [min(config.channels * 2**index, config.max_channels) for index in range(count)]
