"""Samples survive JSON unchanged."""

import json
import math

import numpy as np
import pytest

from openmimo.core.errors import DataError
from openmimo.core.samples import Sample
from openmimo.rl.sample_io import append_samples, read_samples, sample_from_dict, sample_to_dict


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


def assert_same(one, other):
    assert repr(one) == repr(other)  # NaN equals NaN here
    if one.routed_experts is not None:
        assert one.routed_experts.dtype == other.routed_experts.dtype
        assert np.array_equal(one.routed_experts, other.routed_experts)


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
    assert_same(sample, sample_from_dict(json.loads(json.dumps(sample_to_dict(sample), allow_nan=False))))


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
        sample_from_dict(values | {"colour": 1})
    with pytest.raises(DataError, match="reward"):
        sample_from_dict({key: value for key, value in values.items() if key != "reward"})


def test_files_grow_and_survive_a_crash(tmp_path):
    path = tmp_path / "folder" / "samples.jsonl"
    samples = [make_sample(), make_sample(np.array([[[1, 2]], [[3, 4]]], np.uint8))]
    append_samples(path, samples)
    with open(path, "a") as file:
        file.write('{"token_ids": [1, 2')  # cut short
    assert len(read_samples(path)) == 2
    append_samples(path, samples[:1])
    for ours, theirs in zip([*samples, samples[0]], read_samples(path), strict=True):
        assert_same(ours, theirs)
    path.write_text('{"token_ids": [1, 2\n')
    with pytest.raises(DataError, match="line 1"):
        read_samples(path)
