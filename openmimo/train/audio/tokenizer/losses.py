"""Losses of the tokenizer's training. B waveforms, S samples."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from openmimo.model.audio.mel import LogMel


class MultiScaleMel(nn.Module):
    """Mean absolute difference of log-mel spectrograms, the mean of several scales.

    Scale i has 2^i bands, windows of 15 * 2^(i-1) samples, and hops of half a window.

    Args:
        sample_rate: Samples per second.
        scales: The scales i.
        smallest: Magnitudes of bands below this count as silence.
    """

    def __init__(self, sample_rate: int, scales: Sequence[int], smallest: float = 1e-5):
        super().__init__()
        self.transforms = nn.ModuleList(
            LogMel(
                sample_rate=sample_rate,
                fft_samples=15 * 2 ** (scale - 1),
                window_samples=15 * 2 ** (scale - 1),
                hop_samples=15 * 2 ** (scale - 2),
                mel_bins=2**scale,
                smallest=smallest,
            )
            for scale in scales
        )

    def forward(self, decoded_BS: torch.Tensor, target_BS: torch.Tensor) -> torch.Tensor:
        """Return the distance, a scalar. Differentiable in the decoded waveforms."""
        distances = [F.l1_loss(transform(decoded_BS), transform(target_BS)) for transform in self.transforms]
        return torch.stack(distances).mean()


Features = list[torch.Tensor]  # of one discriminator: those of each convolution, and last its judgment


def discriminator_loss(real: Sequence[Features], decoded: Sequence[Features]) -> torch.Tensor:
    """Return the hinge loss of discriminators, a scalar: judgments of real waveforms are to exceed 1, others -1."""
    losses = [
        F.relu(1 - a[-1]).mean() + F.relu(1 + b[-1]).mean() for a, b in zip(real, decoded, strict=True)
    ]  # fmt: skip
    return torch.stack(losses).mean()


def adversarial_loss(decoded: Sequence[Features]) -> torch.Tensor:
    """Return the generator's hinge loss, a scalar."""
    return torch.stack([-features[-1].mean() for features in decoded]).mean()


def feature_loss(real: Sequence[Features], decoded: Sequence[Features]) -> torch.Tensor:
    """Return the mean difference of features, relative to the size of those of real waveforms; a scalar."""
    distances = [
        F.l1_loss(b, a.detach()) / a.detach().abs().mean().clamp(min=1e-6)
        for features_a, features_b in zip(real, decoded, strict=True)
        for a, b in zip(features_a[:-1], features_b[:-1], strict=True)
    ]
    return torch.stack(distances).mean()
