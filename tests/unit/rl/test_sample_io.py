"""Samples survive JSON unchanged."""

import json
import math

import numpy as np
import pytest

from openmimo.core.errors import DataError
from openmimo.core.samples import Sample
from openmimo.rl.scheduling.sample_files import pack_sample, sample_from_dict, sample_to_dict, unpack_sample


def make_sample(routed_experts=None):
    return Sample(
        token_ids=[5, 6, 7],
        loss_mask=[False, True, True],
        logprobs=[0.0, -0.1, -math.inf],
        versions=[-1, 3, 4],
        domain="math",
        group="math/7",
        finish_reason="stop",
        temperature=0.7,
        routed_experts=routed_experts,
        advantages=[0.0, 1 / 3, 1e-300],
        teacher_logprobs=[math.nan, -0.25, math.nan],
        info={"sample_id": "math/7/0", "turns": [1, 2]},
    )


@pytest.mark.parametrize(
    "experts",
    [
        None,
        np.array([[[0, 255]], [[1, 2]]], np.uint8),
        np.array([[[-1, 300]], [[1, 2]]], np.int16),
        np.zeros((0, 2, 8), np.uint8),
    ],
)
def test_round_trip(experts):
    sample = make_sample(experts)
    assert sample == sample_from_dict(json.loads(json.dumps(sample_to_dict(sample), allow_nan=False)))


@pytest.mark.parametrize(("low", "high", "dtype"), [(0, 255, "uint8"), (-1, 255, "int16"), (0, 256, "int16")])
def test_wide_expert_ids_are_stored_small(low, high, dtype):
    experts = np.array([[[low, high]]], np.int64)
    values = sample_to_dict(make_sample(experts))["routed_experts"]
    assert values["dtype"] == dtype
    assert np.array_equal(sample_from_dict(sample_to_dict(make_sample(experts))).routed_experts, experts)


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="int16"):
        sample_to_dict(make_sample(np.array([[[40_000]]])))
    values = sample_to_dict(make_sample())
    with pytest.raises(DataError, match="not a saved sample"):
        sample_from_dict(values | {"color": 1})
    with pytest.raises(DataError, match="reward"):
        sample_from_dict({key: value for key, value in values.items() if key != "reward"})


@pytest.mark.parametrize("experts", [None, np.array([[[0, 255]], [[1, 2]]], np.uint8), np.zeros((0, 2, 8), np.uint8)])
def test_bytes_keep_every_bit(experts):
    sample = make_sample(experts)
    sample.earlier = [make_sample(np.array([[[-1, 300]], [[1, 2]]], np.int16)), make_sample()]
    plain, data = pack_sample(sample)
    again = unpack_sample(json.loads(json.dumps(plain, allow_nan=False)), data)
    assert sample == again
