"""An exponential moving average of all steps, for every step to come."""

import numpy as np

from openmimo.parallel.expert_load.predictor import Predictor, as_shares

DECAY = 0.99


def predict(past_SLE: np.ndarray, horizon: int) -> np.ndarray:
    """Return the average, in which a step counts 0.99 of the one after it."""
    weights_S = DECAY ** np.arange(len(past_SLE) - 1, -1, -1, dtype=np.float64)
    return as_shares(np.tensordot(weights_S / weights_S.sum(), past_SLE, axes=1)[None])


PLUGIN = Predictor(f"an exponential average with decay {DECAY}", predict)
