"""Samples and their files: checked arrays, exact copies, arrays that outlive their file."""

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

from openmimo.core.errors import DataError
from openmimo.core.sample_files import (
    read_sample,
    read_state,
    refer_to_file,
    sample_from_dict,
    write_sample,
    write_state,
)
from openmimo.core.samples import ArrayFile, Sample, StoredArray

ROUTES = np.array([[[0, 255]], [[1, 2]]], np.uint8)


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


def test_per_token_values_are_arrays_however_they_are_set():
    sample = make_sample()
    assert (sample.token_ids.dtype, sample.loss_mask.dtype, sample.logprobs.dtype) == (np.int32, np.bool_, np.float64)
    assert (sample.versions.dtype, sample.weights.shape, len(sample), sample.prompt_length) == (np.int32, (0,), 3, 1)
    sample.weights = [0, 0.5, 0.5]
    assert sample.weights.dtype == np.float64
    assert make_sample() == make_sample() and sample != make_sample()
    assert replace(sample, reward=math.nan, weights=[]) == make_sample()
    assert make_sample(ROUTES) != make_sample() and make_sample(ROUTES) != make_sample(ROUTES.astype(np.int16))
    assert Sample([], [], [], []).written_versions().tolist() == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ids", [1, 2, 2**31]),
        ("token_ids", [1, 2, 0.5]),
        ("token_ids", [[1, 2, 3]]),
        ("versions", [1, 2]),
        ("loss_mask", [0, 1, 2]),
        ("logprobs", [0.0, "a", 0.0]),
        ("versions", [-1, math.nan, 0]),
        ("weights", [0.5]),
    ],
)
def test_values_of_another_type_or_length_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}|could not convert"):
        replace(make_sample(), **{name: value})


@pytest.mark.parametrize(
    "experts",
    [None, ROUTES, np.array([[[-1, 300]], [[1, 2]]], np.int16), np.zeros((0, 2, 8), np.uint8)],
)
def test_files_keep_every_bit(experts, tmp_path):
    sample = make_sample(experts)
    sample.earlier = [make_sample(np.array([[[-1, 300]], [[1, 2]]], np.int16)), make_sample()]
    file = ArrayFile(tmp_path / "arrays")
    values = json.loads(json.dumps(write_sample(sample, file), allow_nan=False))
    assert read_sample(values, ArrayFile(tmp_path / "arrays", read_only=True)) == sample
    before = pickle.loads(pickle.dumps(sample))
    refer_to_file(sample, values, file)
    assert isinstance(sample.earlier[0].routed_experts, StoredArray) and sample == before


def test_a_reference_outlives_its_file_and_becomes_an_array_in_another_process(tmp_path):
    file = ArrayFile(tmp_path / "arrays")
    large = np.random.default_rng(0).integers(0, 256, (4000, 47, 8), np.uint8)
    stored = [file.append(array) for array in (ROUTES, large, ROUTES)]
    (tmp_path / "arrays").unlink()
    del file
    for array, own in zip((ROUTES, large, ROUTES), stored, strict=True):
        assert np.array_equal(own, array) and (len(own), own.shape) == (len(array), array.shape)
        copy = pickle.loads(pickle.dumps(own))
        assert isinstance(copy, np.ndarray) and np.array_equal(copy, array)


@pytest.mark.parametrize(("low", "high", "dtype"), [(0, 255, "|u1"), (-1, 255, "<i2"), (0, 256, "<i2")])
def test_wide_expert_ids_are_stored_small(low, high, dtype, tmp_path):
    experts = np.array([[[low, high]]], np.int64)
    file = ArrayFile(tmp_path / "arrays")
    sample = read_sample(write_sample(make_sample(experts), file), file)
    assert sample.routed_experts.dtype == dtype and np.array_equal(sample.routes, experts)
    with pytest.raises(DataError, match="int16"):
        write_sample(make_sample(np.array([[[40_000]]])), file)


def test_a_state_keeps_its_samples(tmp_path):
    state = {"groups": [{"sample": make_sample(ROUTES), "id": 1}, {"sample": None}], "counts": {"sample": {"a": 1}}}
    plain = json.loads(json.dumps(write_state(state, tmp_path / "arrays"), allow_nan=False))
    assert read_state(plain, tmp_path / "arrays") == state
    assert write_state({"step": 3}, tmp_path / "none") == {"step": 3} == read_state({"step": 3}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_samples_that_the_version_before_saved_are_read():
    values = {
        "token_ids": [5, 6, 7], "loss_mask": [False, True, True], "logprobs": [0.0, -0.1, "-inf"],
        "versions": [-1, 3, 4], "domain": "math", "group": "math/7", "reward": None, "finish_reason": "stop",
        "temperature": 0.7, "routed_experts": {"dtype": "uint8", "shape": [2, 1, 2], "base64": "AP8BAg=="},
        "advantages": [0.0, 1 / 3, 1e-300], "weights": [], "teacher_logprobs": [None, -0.25, None], "episode": "",
        "earlier": [], "info": {"sample_id": "math/7/0", "turns": [1, 2]},
    }  # fmt: skip
    assert sample_from_dict(values) == make_sample(ROUTES)
    with pytest.raises(DataError, match="not a saved sample"):
        sample_from_dict(values | {"color": 1})
    with pytest.raises(DataError, match="reward"):
        sample_from_dict({key: value for key, value in values.items() if key != "reward"})
