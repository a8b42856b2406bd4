"""Errors of load forecasts and the error that sampling alone leaves (arXiv 2404.16914 prints none).

Each token visits k different experts. If it chooses expert e with probability k p, independently of other tokens, the
share of e among N slots has the variance p (1 - k p) / N, and a forecast that knows p is off by sqrt(2 / pi) standard
deviations on average. For k = 1 that is sqrt(2 / pi) sqrt((1 - p) / (p N)) relative to p. Tokens of one text choose
alike, so that a measured error can stay above this floor with a perfect forecast.

Shapes: S past steps, H steps of the horizon, L layers, E experts.
"""

from dataclasses import dataclass

import numpy as np

from openmimo.core.errors import ConfigError
from openmimo.core.load_trace import LoadTrace
from openmimo.parallel.expert_load.predictor import PREDICTORS


def share_deviation(shares: np.ndarray, slots: np.ndarray | float, experts_per_token: int = 1) -> np.ndarray:
    """Return the standard deviation of measured shares around `shares`, for `slots` routed slots (broadcast)."""
    return np.sqrt(shares * np.maximum(1.0 - experts_per_token * shares, 0.0) / slots)


def noise_floor(shares: np.ndarray, slots: np.ndarray | float, experts_per_token: int = 1) -> np.ndarray:
    """Return the expected absolute error of the perfect forecast of `shares`, divided by the share (0 for a 0)."""
    deviation = share_deviation(shares, slots, experts_per_token)
    return np.sqrt(2 / np.pi) * np.divide(deviation, shares, out=np.zeros_like(deviation), where=shares > 0)


@dataclass(frozen=True)
class ForecastError:
    """Errors of one forecast by layer, as a share of all slots: absolute errors summed over the experts.

    This is the mean of the relative errors weighted by load. Unweighted, an expert without tokens would have no error.

    Attributes:
        step_L: Mean error of a step.
        step_floor_L: What the perfect forecast would have.
        horizon_L: Error of the mean over the horizon.
        horizon_floor_L: What the perfect forecast would have.
    """

    step_L: np.ndarray
    step_floor_L: np.ndarray
    horizon_L: np.ndarray
    horizon_floor_L: np.ndarray


def error_of(
    forecast_HLE: np.ndarray, shares_HLE: np.ndarray, slots_HL: np.ndarray, experts_per_token: int
) -> ForecastError:
    """Return the errors of a forecast against what happened."""
    mean_LE = shares_HLE.mean(axis=0)
    floor_HLE = mean_LE * noise_floor(mean_LE, slots_HL[..., None], experts_per_token)
    horizon_floor_LE = mean_LE * noise_floor(mean_LE, slots_HL.sum(axis=0)[:, None], experts_per_token)
    return ForecastError(
        step_L=np.abs(forecast_HLE - shares_HLE).sum(axis=-1).mean(axis=0),
        step_floor_L=floor_HLE.sum(axis=-1).mean(axis=0),
        horizon_L=np.abs(np.broadcast_to(forecast_HLE, shares_HLE.shape).mean(axis=0) - mean_LE).sum(axis=-1),
        horizon_floor_L=horizon_floor_LE.sum(axis=-1),
    )


@dataclass(frozen=True)
class Backtest:
    """Forecasts made inside a trace, and what happened after them.

    Attributes:
        origins: Number of past steps of each forecast.
        forecasts: Forecast by predictor, a list over the origins of float64 [horizon or 1, layers, experts].
        errors: Errors by predictor, a list over the origins.
    """

    origins: list[int]
    forecasts: dict[str, list[np.ndarray]]
    errors: dict[str, list[ForecastError]]


def backtest(trace: LoadTrace, predictors: list[str], *, horizon: int, num_origins: int) -> Backtest:
    """Forecast the last parts of a trace from the steps before them. The last horizon ends with the trace.

    Args:
        trace: The trace.
        predictors: Names of predictors.
        horizon: Steps to forecast.
        num_origins: Number of horizons, which follow each other; fewer if the trace is short.

    Raises:
        ConfigError: The trace is shorter than twice the horizon, or a predictor cannot be used.
    """
    num_steps = len(trace.steps)
    if num_steps < 2 * horizon:
        raise ConfigError(
            f"a horizon of {horizon} steps needs a trace of at least {2 * horizon} steps, and this one has "
            f"{num_steps}; set --horizon to at most {num_steps // 2}."
        )
    count = min(num_origins, num_steps // horizon - 1)
    origins = [num_steps - horizon * left for left in range(count, 0, -1)]
    shares, slots = trace.shares, trace.slots
    forecasts: dict[str, list[np.ndarray]] = {}
    errors: dict[str, list[ForecastError]] = {}
    for name in predictors:
        predict = PREDICTORS.get(name).predict
        forecasts[name] = [predict(shares[:origin], horizon) for origin in origins]
        errors[name] = [
            error_of(
                forecast,
                shares[origin : origin + horizon],
                slots[origin : origin + horizon],
                trace.header.experts_per_token,
            )
            for origin, forecast in zip(origins, forecasts[name], strict=True)
        ]
    return Backtest(origins, forecasts, errors)
