"""The mean of the last 100 steps, for every step to come (arXiv 2404.16914, SW_Avg).

The paper appends each forecast to the window and averages again. Repeated, that tends to a weighted mean of the window;
the plain mean is the forecast of the first of those steps.
"""

import numpy as np

from openmimo.parallel.expert_load.predictor import Predictor, as_shares

WINDOW_STEPS = 100


def predict(past_SLE: np.ndarray, horizon: int) -> np.ndarray:
    """Return the mean of the window."""
    return as_shares(past_SLE[-WINDOW_STEPS:].mean(axis=0, keepdims=True))


PLUGIN = Predictor(f"the mean of the last {WINDOW_STEPS} steps", predict)
