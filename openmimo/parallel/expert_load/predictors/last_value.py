"""The shares of the last step, for every step to come."""

import numpy as np

from openmimo.parallel.expert_load.predictor import Predictor, as_shares


def predict(past_SLE: np.ndarray, horizon: int) -> np.ndarray:
    """Return the last row."""
    return as_shares(past_SLE[-1:])


PLUGIN = Predictor("the last step", predict)
