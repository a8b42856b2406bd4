"""Few-shot removal of noise: the input has white noise, the conversion has none.

The candidates are the clean input, the noisy one, and three other clean sentences: clean speech that ignores the input
is right in one of four cases.
"""

import numpy as np

from openmimo.evals.audio.sounds import with_noise
from openmimo.evals.audio.task import AudioTask, OpenTask, Sound
from openmimo.evals.audio.tasks._conversions import ConversionOptions, Converted, FewShot

_DECIBELS = (0.0, 5.0, 10.0)


def _convert(sound: Sound, others: tuple[Sound, ...], source: np.random.Generator, choice: int) -> Converted:
    noisy = with_noise(sound, _DECIBELS[choice], source)
    return Converted(noisy, sound, (noisy, *others))


def _open(options: ConversionOptions, seed: int) -> OpenTask:
    return FewShot(options, seed, _convert, num_choices=len(_DECIBELS), chance=1 / 4)


PLUGIN = AudioTask(version=1, options=ConversionOptions, open=_open)
