"""The judge of voices: the speaker encoder of Resemblyzer (GE2E, arXiv 1710.10467), with the weights of its package.

Only the file of weights is read. Importing the package would need librosa and a compiled voice detector; silence is cut
here by its level instead. Embeddings of the package and of this file agree for the same samples.
"""

import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from openmimo.core.errors import ConfigError, UserError
from openmimo.data.audio.files import resample

_RATE = 16_000
_FFT, _HOP, _BANDS = 400, 160, 40
_WINDOW_FRAMES, _STEP_FRAMES = 160, 77
_LEAST_COVERED = 0.75
_LEVEL = 10 ** (-30 / 20)


class SpeakerJudge(nn.Module):
    """Embeds speech so that recordings of one voice lie near each other.

    Args:
        weights: The file `pretrained.pt` of Resemblyzer (None: that of the installed package).

    Raises:
        ConfigError: The package is not installed.
        UserError: The file has other weights.
    """

    bands: torch.Tensor

    def __init__(self, weights: Path | None = None):
        super().__init__()
        self.lstm = nn.LSTM(_BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.register_buffer("bands", torch.from_numpy(_mel_bands()), persistent=False)
        path = weights or _installed_weights()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
            own = self.state_dict()
            self.load_state_dict({name: state[name] for name in own})
        except (KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} does not have the weights of Resemblyzer 0.1.4: {error}") from error
        self.eval()

    @torch.no_grad()
    def embed(self, samples_S: np.ndarray, sample_rate: int) -> np.ndarray:
        """Returns the embedding of a recording, of length 1: the mean over windows of 1.6 s.

        Silence is cut, and quiet recordings are amplified.
        """
        samples = _without_silence(_amplified(resample(samples_S.astype(np.float32), sample_rate, _RATE)))
        return self.embed_samples(samples)

    @torch.no_grad()
    def embed_samples(self, samples_S: np.ndarray) -> np.ndarray:
        """Returns the embedding of samples of 16 kHz as they are."""
        starts = _window_starts(len(samples_S))
        padded = np.pad(samples_S, (0, max(0, (starts[-1] + _WINDOW_FRAMES) * _HOP - len(samples_S))))
        spectrum = torch.stft(
            torch.from_numpy(padded), _FFT, _HOP, window=torch.hann_window(_FFT), pad_mode="constant",
            return_complex=True,
        )  # fmt: skip
        mel_LB = (self.bands @ spectrum.abs().square()).T
        windows = torch.stack([mel_LB[start : start + _WINDOW_FRAMES] for start in starts])
        _, (hidden, _) = self.lstm(windows)
        parts = torch.nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)
        return torch.nn.functional.normalize(parts.mean(dim=0), dim=0).numpy()

    def voice(self, recordings: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
        """Returns the mean embedding of recordings of one voice, of length 1."""
        mean = np.mean([self.embed(samples, sample_rate) for samples in recordings], axis=0)
        return mean / np.linalg.norm(mean)


def _installed_weights() -> Path:
    found = importlib.util.find_spec("resemblyzer")
    if found is None or found.origin is None:
        raise ConfigError(
            "the judge of voices needs `pip install --no-deps resemblyzer==0.1.4`, as make demo-audio does."
        )
    return Path(found.origin).parent / "pretrained.pt"


def _window_starts(samples: int) -> list[int]:
    """First frames of the windows. The last window is left out if less than three quarters of it is covered."""
    frames = -(-(samples + 1) // _HOP)
    starts = list(range(0, max(1, frames - _WINDOW_FRAMES + _STEP_FRAMES + 1), _STEP_FRAMES))
    covered = (samples - starts[-1] * _HOP) / (_WINDOW_FRAMES * _HOP)
    return starts[:-1] if covered < _LEAST_COVERED and len(starts) > 1 else starts


def _amplified(samples_S: np.ndarray) -> np.ndarray:
    level = float(np.sqrt(np.sum(samples_S**2) / max(1, len(samples_S))))
    return samples_S * np.float32(_LEVEL / level) if 0 < level < _LEVEL else samples_S


def _without_silence(samples_S: np.ndarray, *, decibels: float = -35.0) -> np.ndarray:
    """The samples without windows of 30 ms that are quiet, except those within 0.1 s of a loud one."""
    window = _RATE * 30 // 1000
    count = len(samples_S) // window
    if not count:
        return samples_S
    levels = np.sqrt(np.mean(samples_S[: count * window].reshape(count, window) ** 2, axis=1))
    loud = levels > levels.max() * 10 ** (decibels / 20)
    near = np.convolve(loud, np.ones(7))[3:-3] > 0
    return samples_S[: count * window][np.repeat(near, window)]


def _mel_bands() -> np.ndarray:
    """The mel filters [bands, frequencies] of Slaney's Auditory Toolbox, of equal area, from 0 to half the rate.

    The scale is linear up to 1000 Hz, at 200/3 Hz for each mel, and then logarithmic with a factor of 6.4 in 27 mels.
    """
    top = 15 + 27 * np.log(_RATE / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, top, _BANDS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    frequencies = np.linspace(0, _RATE / 2, _FFT // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return filters.astype(np.float32)
