"""Distances between sounds, and between texts. S samples."""

from collections.abc import Sequence

import numpy as np

from openmimo.data.audio.files import optional_module
from openmimo.evals.audio.measures import edit_distance

_SILENT_DECIBELS = -100.0


def si_sdr(decoded_S: np.ndarray, target_S: np.ndarray) -> float:
    """Returns the scale-invariant signal-to-distortion ratio in dB (Le Roux et al., arXiv 1811.02508, equation 5).

    It is -100 where one of the two is silent, for which the ratio has no value.
    """
    target = target_S.astype(np.float64) - target_S.mean()
    decoded = decoded_S.astype(np.float64) - decoded_S.mean()
    if not target.any() or not decoded.any():
        return _SILENT_DECIBELS
    projection = (decoded @ target) / (target @ target) * target
    noise = decoded - projection
    return float(10 * np.log10((projection @ projection) / (noise @ noise)))


def stoi(decoded_S: np.ndarray, target_S: np.ndarray, sample_rate: int) -> float:
    """Returns the short-time objective intelligibility, 0 to 1 (pystoi)."""
    return float(optional_module("pystoi", "audio-demo").stoi(target_S, decoded_S, sample_rate))


def error_rate(found: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """Returns the edits of all texts by the length of all references; of words or of characters."""
    edits = sum(edit_distance(a, b) for a, b in zip(found, references, strict=True))
    return edits / sum(len(reference) for reference in references)


def chance_error_rate(found: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """Returns the mean error rate of texts against the references of others: all rotations of the list."""
    count = len(references)
    rates = [error_rate(found, [*references[shift:], *references[:shift]]) for shift in range(1, count)]
    return float(np.mean(rates))
