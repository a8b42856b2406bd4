"""ARIMA of each expert's share (arXiv 2404.16914), fitted with statsmodels, an optional package."""

import importlib
import warnings

import numpy as np

from openmimo.core.errors import ConfigError
from openmimo.parallel.expert_load.predictor import Predictor, as_shares

ORDER = (5, 1, 5)
MOST_STEPS = 500  # the time of a fit rises with the number of steps
_LEAST_STEPS = 30


def predict(past_SLE: np.ndarray, horizon: int) -> np.ndarray:
    """Fit each series of the last 500 steps by itself. A series that does not change is continued as it is."""
    if len(past_SLE) < _LEAST_STEPS:
        raise ConfigError(f"arima needs at least {_LEAST_STEPS} steps of the past; there are {len(past_SLE)}.")
    try:
        arima = importlib.import_module("statsmodels.tsa.arima.model").ARIMA
    except ImportError as error:
        raise ConfigError("arima needs statsmodels: pip install 'openmimo[forecast]', or name another.") from error
    series_SN = past_SLE[-MOST_STEPS:].reshape(min(len(past_SLE), MOST_STEPS), -1)
    forecast_HN = np.empty((horizon, series_SN.shape[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # starting values that are not stationary are replaced
        for column, series_S in enumerate(series_SN.T):
            if np.ptp(series_S) == 0.0:
                forecast_HN[:, column] = series_S[-1]
                continue
            fitted = arima(series_S, order=ORDER).fit(method_kwargs={"maxiter": 50})
            forecast_HN[:, column] = np.nan_to_num(fitted.forecast(horizon), nan=series_S.mean())
    return as_shares(forecast_HN.reshape(horizon, *past_SLE.shape[1:]))


PLUGIN = Predictor(f"ARIMA{ORDER} of each expert (statsmodels)", predict)
