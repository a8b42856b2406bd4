"""Runs of the real trainer with failing environments: a run that learned from no sample is reported as a failure."""

import io
import json
import threading
from dataclasses import replace

import pytest
import rl_failing
import torch
from rich.console import Console
from rl_failing import REWARDS
from rl_runs import grpo_config, save_models, sorting_source, source

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.metrics import read_metrics
from openmimo.rl import run as run_module
from openmimo.rl.config import RlEvaluation, SchedulingConfig


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(autouse=True)
def episodes():
    """Ends the calls that hang in a test when the test ends."""
    rl_failing._counted["episodes"] = 0
    rl_failing.hang.clear()
    yield
    rl_failing.hang.set()


def failing(environment="rl_failing:FAILING", **options):
    return source("letters", environment, **options)


def config_of(models, folder, *sources, **changes):
    own = {"steps": 2, "max_draws": 1.0, "updates_per_step": 1, "evaluation": RlEvaluation(problems=2)}
    return grpo_config(models, folder, sources=sources, **own | changes)


def train(config, monkeypatch):
    """Runs to a successful end. Returns the rows of the metrics and the text of the console."""
    out = io.StringIO()
    monkeypatch.setattr(run_module, "write_report", lambda run_folder: run_folder)
    run_module.train(config, console=Console(file=out, width=4000))
    rows = read_metrics(run_module.Path(config.run_folder) / "metrics.jsonl")
    return [row for row in rows if "samples" in row], out.getvalue()


def refusal(config):
    """Runs until a UserError. Returns its message and the text of the console."""
    out = io.StringIO()
    with pytest.raises(UserError) as caught:
        run_module.train(config, console=Console(file=out, width=4000))
    return str(caught.value), out.getvalue()


def slowly(*values):
    """More cases of the same kind, marked as slow."""
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


PLACES = [
    ("rl_failing:FAILING", "open"),
    ("rl_failing:SLOW_FAILING", "reward"),
    *slowly(
        ("rl_failing:FAILING", "respond"),
        ("rl_failing:FAILING", "reward"),
        ("rl_failing:SLOW_FAILING", "open"),
        ("rl_failing:SLOW_FAILING", "respond"),
    ),
]


@pytest.mark.parametrize(
    "how", ["nan", "hundred", "text", *slowly(("inf",), ("minus",), ("none",), ("list",), ("numpy_nan",))]
)
def test_what_is_no_reward_ends_the_run_and_is_named(models, tmp_path, how):
    message, _ = refusal(config_of(models, tmp_path / "run", failing(how=how)))
    assert "rl_failing:FAILING" in message and "validation-" in message and repr(REWARDS[how]) in message


@pytest.mark.parametrize("how", ["nan", *slowly(("hundred",))])
def test_a_reward_that_is_none_ends_the_run_in_the_middle_of_training(models, tmp_path, how):
    """Only some rewards are NaN, they come from threads, and the first comes after the evaluation."""
    message, _ = refusal(config_of(models, tmp_path / "run", failing("rl_failing:SLOW_FAILING", how=how, every=9)))
    assert "rl_failing:SLOW_FAILING" in message and "train-" in message


def test_numbers_of_any_kind_are_rewards(models, tmp_path, monkeypatch):
    for how, value in {"half": 0.5, "numpy": 0.25, "tensor": 1.0, "true": 1.0, "rounding": 1.0}.items():
        config = config_of(models, tmp_path / how, failing(how=how), steps=1, dynamic_sampling=False)
        rows, _ = train(config, monkeypatch)
        assert rows[0]["reward/mean"] == value


@pytest.mark.parametrize(("environment", "where"), PLACES)
def test_a_run_that_loses_every_sample_ends_with_the_exception(models, tmp_path, where, environment):
    config = config_of(models, tmp_path / "run", failing(environment, where=where))
    message, _ = refusal(config)
    assert "LookupError: the key of the answer is lost" in message and where in message
    assert not (tmp_path / "run" / "model").exists()


def test_the_first_failure_is_shown_at_once_and_all_are_counted(models, tmp_path, monkeypatch):
    config = config_of(models, tmp_path / "run", failing(every=5), steps=3, max_draws=4.0)
    rows, text = train(config, monkeypatch)
    assert text.count("LookupError: the key of the answer is lost") == 2  # one by the evaluation, one by the steps
    assert sum(row["errors"] for row in rows) == sum(row["scheduler/errors"] for row in rows) > 1
    assert f"{sum(row['learned_samples'] > 0 for row in rows)} of 3 steps learned" in text


def test_a_step_that_loses_all_its_samples_ends_the_run_unless_it_may(models, tmp_path, monkeypatch):
    """The first evaluation works; every later episode fails."""
    from rl_failing import FailingEpisode

    opened = iter(range(10**6))
    real = FailingEpisode.reward

    def reward(own):
        if next(opened) >= 2:
            raise LookupError("lost later")
        return real(own)

    monkeypatch.setattr(FailingEpisode, "reward", reward)
    message, text = refusal(config_of(models, tmp_path / "a", failing(where="nowhere")))
    assert "lost every sample of a step" in message and "lost later" in message
    assert "warning: source 'letters' lost a sample" in text
    opened = iter(range(10**6))
    allowed = config_of(
        models, tmp_path / "b", failing(where="nowhere"), max_lost_steps=5, evaluation=RlEvaluation(99, 2)
    )
    message, text = refusal(replace(allowed, steps=2))
    assert "lost later" in message
    assert not (tmp_path / "b" / "model").exists()


def test_one_source_that_fails_among_good_ones_ends_the_run(models, tmp_path):
    good = replace(sorting_source(), name="good")
    config = config_of(models, tmp_path / "run", good, failing(), dynamic_sampling=False)
    message, _ = refusal(config)
    assert "'letters'" in message and "LookupError" in message


def test_a_task_that_is_never_solved_says_so(models, tmp_path, monkeypatch):
    rows, text = train(config_of(models, tmp_path / "run", sorting_source()), monkeypatch)
    assert [row["learned_samples"] for row in rows] == [0, 0]
    assert not any("reward/mean" in row for row in rows)
    assert text.count("learned nothing") == 1 and "never solved: 3" in text
    assert "warning: 0 of 2 steps learned, from 0 samples" in text


def test_equal_rewards_teach_nothing_where_no_group_is_dropped(models, tmp_path, monkeypatch):
    config = config_of(models, tmp_path / "run", failing(how="half"), dynamic_sampling=False)
    rows, text = train(config, monkeypatch)
    assert [row["samples"] for row in rows] == [12, 12]
    assert "0 of 2 steps learned, from 0 samples" in text


def test_prompts_longer_than_the_context_are_an_error_at_once(models, tmp_path):
    message, _ = refusal(config_of(models, tmp_path / "run", failing(where="nowhere", words=400)))
    assert "at most 319 are allowed" in message


def test_the_prompt_limit_of_a_source_holds(models, tmp_path, monkeypatch):
    """Ids of one and of two digits have prompts of different lengths."""
    own = failing(where="nowhere", words=3)
    allowed = config_of(models, tmp_path / "long", own, steps=3, max_draws=3.0)
    assert sum(row["too_long_prompts"] for row in train(allowed, monkeypatch)[0]) == 0
    message, _ = refusal(config_of(models, tmp_path / "short", replace(own, max_prompt_tokens=1)))
    assert "at most 1 are allowed" in message


@pytest.mark.parametrize(("environment", "where"), PLACES)
def test_an_environment_that_hangs_now_and_then_does_not_hold_the_run_up(
    models, tmp_path, monkeypatch, where, environment
):
    config = config_of(
        models, tmp_path / "run", failing(environment, where=where, how="hang", every=13), steps=1, max_draws=4.0,
        environment_seconds=0.5, dynamic_sampling=False, scheduling=SchedulingConfig(max_sample_retries=3),
    )  # fmt: skip
    rows, text = train(config, monkeypatch)
    assert rows[0]["samples"] == 12
    assert rows[0]["timeouts"] >= 1 and rows[0]["hung_calls"] >= 1
    assert "did not return within 0.5 seconds" in text and "rl_failing.py" in text


def test_a_late_answer_can_have_a_reward_of_its_own(models, tmp_path, monkeypatch):
    config = config_of(
        models, tmp_path / "run", failing(how="hang", every=13), steps=1, environment_seconds=0.5, timeout_reward=0.0,
        dynamic_sampling=False,
    )  # fmt: skip
    rows, _ = train(config, monkeypatch)
    assert (rows[0]["samples"], rows[0]["timeouts"], rows[0]["errors"]) == (12, 1, 0)


def test_too_many_hung_calls_end_the_run(models, tmp_path):
    before = threading.active_count()
    config = config_of(models, tmp_path / "run", failing(how="hang"), environment_seconds=0.02)
    message, _ = refusal(replace(config, evaluation=RlEvaluation(problems=40)))
    assert "threads cannot be killed" in message and "rl_failing.py" in message
    assert threading.active_count() - before < 30


def test_sys_exit_in_a_scorer_ends_no_process(models, tmp_path):
    message, _ = refusal(config_of(models, tmp_path / "run", failing(how="exit")))
    assert "SystemExit" in message


def test_metrics_are_json(models, tmp_path, monkeypatch):
    train(config_of(models, tmp_path / "run", failing(where="nowhere")), monkeypatch)

    def refuse(constant):
        raise AssertionError(constant)

    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "mopd"},
        {"max_staleness": 2},
        {"scheduling": SchedulingConfig(wait_age=1)},
        {"scheduling": SchedulingConfig(max_partial_fraction=0.5)},
        {"dynamic_sampling": False, "scheduling": SchedulingConfig(margin=0.5)},
    ],
)
def test_settings_without_effect_are_refused_before_anything_is_written(models, tmp_path, changes):
    with pytest.raises(ConfigError):
        run_module.train(config_of(models, tmp_path / "run", failing(), **changes), console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
