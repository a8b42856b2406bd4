"""The interface of the predictors in `predictors/`, one file each: shares of the past in, shares of the future out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from openmimo.core.registry import Registry


@dataclass(frozen=True)
class Predictor:
    """A forecast of expert load by name.

    Attributes:
        describe: One line for help and reports.
        predict: Called with the shares of the past, float64 [steps, layers, experts], and the number of steps to
            forecast. Returns float64 [horizon or 1, layers, experts]; one row is a forecast for every step. Rows sum
            to 1. Raises ConfigError if the past is too short or an optional package is missing.
    """

    describe: str
    predict: Callable[[np.ndarray, int], np.ndarray]


PREDICTORS: Registry[Predictor] = Registry("openmimo.parallel.expert_load.predictors", Predictor)


def as_shares(values_HLE: np.ndarray) -> np.ndarray:
    """Return values as shares: at least 0, and 1 in total over the experts. Rows of zeros become uniform."""
    positive = np.maximum(values_HLE, 0.0)
    total = positive.sum(axis=-1, keepdims=True)
    return np.where(total > 0, positive / np.where(total > 0, total, 1.0), 1.0 / values_HLE.shape[-1])
