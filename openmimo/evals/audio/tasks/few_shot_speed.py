"""Few-shot change of speed: every pair plays the input at the same speed, 0.5 to 1.5."""

import numpy as np

from openmimo.evals.audio.sounds import at_speed
from openmimo.evals.audio.task import AudioTask, OpenTask, Sound
from openmimo.evals.audio.tasks._conversions import ConversionOptions, Converted, FewShot

SPEEDS = (0.5, 0.75, 1.0, 1.25, 1.5)


def _convert(sound: Sound, others: tuple[Sound, ...], source: np.random.Generator, choice: int) -> Converted:
    conversions = [at_speed(sound, speed) for speed in SPEEDS]
    target = conversions.pop(choice)
    return Converted(sound, target, tuple(conversions))


def _open(options: ConversionOptions, seed: int) -> OpenTask:
    return FewShot(options, seed, _convert, num_choices=len(SPEEDS), chance=1 / len(SPEEDS))


PLUGIN = AudioTask(version=1, options=ConversionOptions, open=_open)
