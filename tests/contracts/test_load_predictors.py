"""Every predictor of expert load: shares in, shares out, the same ones again, and a constant load continued."""

import importlib.util

import numpy as np
import pytest

from benchmarks.synthetic_load import drawn_trace, random_shares
from openmimo.core.errors import ConfigError
from openmimo.parallel.expert_load.predictor import PREDICTORS

NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "arima" and importlib.util.find_spec("statsmodels") is None, reason="needs statsmodels"
        ),
    )
    for name in PREDICTORS.names()
]


def test_the_predictors_of_the_paper_are_there():
    assert {"last_value", "window_average", "exponential_average", "arima", "lstm"} <= set(PREDICTORS.names())


@pytest.mark.parametrize("name", NAMES)
def test_forecasts_are_shares_and_the_same_again(name):
    constant = np.stack([random_shares(4, spread=1.0, seed=seed)[0] for seed in (0, 1)])
    trace = drawn_trace(np.tile(constant, (120, 1, 1)), tokens=500, seed=0)
    past = trace.shares
    forecast = PREDICTORS.get(name).predict(past, 30)
    assert forecast.shape in ((30, 2, 4), (1, 2, 4)) and forecast.dtype == np.float64
    assert (forecast >= 0).all() and np.allclose(forecast.sum(axis=-1), 1.0)
    assert (past == trace.shares).all()
    assert (forecast == PREDICTORS.get(name).predict(past, 30)).all()
    # the noise of one step is 4 % of the shares at most
    assert np.abs(forecast.mean(axis=0) - constant).max() < 0.08


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_without_tokens_has_none_in_the_forecast(name):
    past = np.tile(np.array([0.5, 0.5, 0.0]), (100, 1, 1))
    forecast = PREDICTORS.get(name).predict(past, 10)
    assert np.allclose(forecast, [0.5, 0.5, 0.0], atol=1e-3)


def test_without_statsmodels_arima_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels.tsa.arima.model", None)
    with pytest.raises(ConfigError, match=r"openmimo\[forecast\]"):
        PREDICTORS.get("arima").predict(np.full((40, 1, 2), 0.5), 5)


@pytest.mark.parametrize("name", ["arima", "lstm"])
def test_a_short_past_is_refused(name):
    with pytest.raises(ConfigError, match="of the past; there are 3"):
        PREDICTORS.get(name).predict(np.full((3, 1, 2), 0.5), 5)
