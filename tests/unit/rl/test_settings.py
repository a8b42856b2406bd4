"""Every setting of post-training has its effect, or is refused before the run writes a file."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rl_runs import grpo_config, mopd_config, run, save_models, source
from rl_world import Scripted, finish, open_rollouts, policy, request, roll_out, tokenizer

from openmimo.cli import main
from openmimo.core.config import save
from openmimo.core.errors import ConfigError
from openmimo.core.metrics import read_metrics
from openmimo.core.records import Request, SamplingParams
from openmimo.core.samples import Sample
from openmimo.data.chat.conversation import encode_prompt
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.model import activations
from openmimo.rl import run as run_module
from openmimo.rl.algorithm import Correction, algorithm_of
from openmimo.rl.config import SchedulingConfig
from openmimo.rl.learning.policy_trainer import score_samples
from openmimo.rl.rollouts.engine import without_thoughts
from openmimo.rl.scheduling.problems import Problem
from openmimo.rl.scheduling.scheduler import DataScheduler


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "grpo"}, "would ignore the teachers"),
        ({"algorithm": "grpo", "signal": "full"}, "would ignore the teachers"),
        ({"signal": "full", "algorithm_options": {"alpha": 0.5}}, "alpha is 0.5, which has no effect"),
        ({"signal": "forward", "algorithm_options": {"advantage_limit": 2.0}}, "advantage_limit"),
        ({"signal": "top_k", "algorithm_options": {"scale_domains": True}}, "scale_domains"),
        ({"signal": "full", "algorithm_options": {"correction": {"kind": "tis"}}}, "correction"),
        ({"signal": "imitate", "writer": "teacher", "algorithm_options": {"alpha": 1.0}}, "alpha"),
        ({"algorithm_options": {"alpha": 0.5}, "sources": (source(samples_per_prompt=1),)}, "samples_per_prompt 1"),
        ({"algorithm_options": {"alpha": 0.5}, "min_reward": 0.5}, "min_reward"),
        ({"algorithm_options": {"scale_domains": True}, "sources": (source(),)}, "scale_domains"),
    ],
)
def test_settings_of_distillation_without_effect_are_refused(models, tmp_path, changes, message):
    config = mopd_config(models, tmp_path / "run", **changes)
    if len(config.sources) == 1:
        config = replace(config, teachers={"letters": "self"})
    with pytest.raises(ConfigError, match=message):
        run_module.train(config, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_more_likely_tokens_than_there_are_are_refused(models, tmp_path):
    config = mopd_config(models, tmp_path / "run", signal="top_k", top_k=10**6)
    with pytest.raises(ConfigError, match="top_k is 1000000"):
        run(config)


def test_parts_of_a_batch_with_nothing_to_learn_from_are_left_out_of_the_means(models, tmp_path):
    config = mopd_config(models, tmp_path / "run", steps=2, updates_per_step=3, min_reward=0.7)
    run(config)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "samples" in row]
    assert len(rows) == 2
    assert all(row["learned_samples"] < row["samples"] for row in rows)


def test_a_partial_step_completes_in_spite_of_an_endless_sample(models, tmp_path):
    config = grpo_config(models, tmp_path, unfinished="partial", dynamic_sampling=False)
    scheduler = DataScheduler(config.scheduler(), {"letters": lambda index: Problem(f"p{index}", index)})
    endless = None
    for version in range(8):
        scheduler.begin_step(version)
        running = [(one, sample_id) for one in scheduler.in_flight() for sample_id in one.sample_ids]
        for _ in range(100):
            if scheduler.is_complete():
                break
            running += [(one, sample_id) for one in scheduler.next_submissions(24) for sample_id in one.sample_ids]
            endless = endless or running[0][1]
            for own, sample_id in running:
                if sample_id != endless:
                    answer = Sample([1, 2], [False, True], [0.0, -0.5], [-1, version])
                    scheduler.on_sample(
                        own.group_id, replace(answer, reward=1.0, finish_reason="stop", info={"sample_id": sample_id})
                    )
            running = []
        batch, report = scheduler.take_batch()
        assert len(batch) == 3
        assert report["short"] == 0
    assert endless not in [sample_id for one in scheduler.in_flight() for sample_id in one.sample_ids]  # too old by now


def test_the_settings_of_the_scheduler_can_be_set(models, tmp_path):
    scheduling = SchedulingConfig(margin=0.7, max_sample_retries=5, wait_age=2, max_partial_fraction=0.3)
    config = grpo_config(models, tmp_path, unfinished="partial", scheduling=scheduling).scheduler()
    values = (config.margin, config.max_sample_retries, config.effective_wait_age, config.max_partial_fraction)
    assert values == (0.7, 5, 2, 0.3)


def test_stale_tokens_are_corrected_by_their_age(models, tmp_path):
    def correction(**changes):
        return algorithm_of(grpo_config(models, tmp_path, **changes))[1].correction

    assert correction() == Correction("tis")
    assert correction(unfinished="partial", max_staleness=2) == Correction("staleness_tis", max_staleness=2)
    chosen = {"unfinished": "partial", "algorithm_options": {"correction": {"kind": "tis"}}}
    assert correction(**chosen) == Correction("tis")


def test_a_run_recomputes_activations_where_it_should(models, tmp_path, monkeypatch):
    seen = []
    inner = activations.checkpoint
    monkeypatch.setattr(activations, "checkpoint", lambda *given, **how: (seen.append(1), inner(*given, **how))[1])
    run(grpo_config(models, tmp_path / "with", steps=1, activation_checkpointing=True))
    assert any(seen)
    seen.clear()
    run(grpo_config(models, tmp_path / "without", steps=1))
    assert not any(seen)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("with", "without")]
    losses = [[row["loss"] for row in own if "loss" in row] for own in rows]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_entropy_is_logged(models, tmp_path):
    run(grpo_config(models, tmp_path / "run", steps=1))
    (entropy,) = [row["entropy"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "entropy" in row]
    assert 0.0 < entropy < torch.tensor(320.0).log()


@torch.no_grad()
def test_temperature_divides_logits_and_not_states():
    """In bfloat16, divided states would round, and the trainer's log-probabilities would differ from the engine's."""
    model = policy(ends=1.0)
    model.compute_dtype = torch.bfloat16
    (sample,) = roll_out(model, lambda own: Scripted(), request(temperature=0.7, samples=1))
    logprobs_TV = (model.logits(torch.tensor(sample.token_ids)).float() / 0.7).log_softmax(-1)
    prompt = Request(
        "p", tuple(sample.token_ids.tolist()), SamplingParams(max_tokens=1, temperature=0.7, prompt_logprobs=True)
    )
    engine = Engine(model, tokenizer(), EngineConfig(prefill_tokens=512, speculative=False, cache_gigabytes=0.01))
    sequence = engine.submit(prompt)
    while engine.has_work:
        engine.step()
    scored = score_samples(model, [sample], replay=False)[0]
    for place in range(1, len(sample.token_ids)):
        expected = float(logprobs_TV[place - 1, sample.token_ids[place]])
        assert sequence.prompt_logprobs[place - 1].logprob == pytest.approx(expected, abs=1e-3)
        if sample.loss_mask[place]:
            assert scored[place] == pytest.approx(expected, abs=1e-5)


def test_rollouts_in_thinking_mode_ask_for_thoughts():
    episodes = []

    def open_episode(own):
        episodes.append(Scripted())
        return episodes[-1]

    rollouts = open_rollouts(policy(), open_episode, thinking=True)
    rollouts.submit(request(samples=2))
    samples = finish(rollouts).values()
    thinking = encode_prompt(tokenizer(), episodes[0].messages, enable_thinking=True)
    plain = encode_prompt(tokenizer(), episodes[0].messages)
    assert thinking != plain
    for sample in samples:
        assert sample.token_ids[: len(thinking)].tolist() == thinking
        assert sample.loss_mask[: len(thinking) + 1].tolist() == [False] * len(thinking) + [True]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("<think>2 and 3</think>5", "5"),
        ("<think></think>5", "5"),
        ("<think>is cut off", ""),
        ("5", "5"),
        ("<think>2+3=", "<think>2+3="),
        (" so</think>5", "5"),
    ],
)
def test_environments_see_the_answer_and_not_the_thoughts(text, seen):
    assert without_thoughts(text, stop=("=",)) == seen


def test_thinking_is_an_option_of_a_run(models, tmp_path):
    run(grpo_config(models, tmp_path / "run", steps=1, thinking=True))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any("samples" in row for row in rows)


def test_algorithm_options_come_from_the_command_line(models, tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(run_module, "train", configs.append)
    path = tmp_path / "config.json"
    save(mopd_config(models, tmp_path / "run", algorithm_options={"correction": {"kind": "icepop", "high": 3.0}}), path)
    own = ["--algorithm-options.alpha", "0.5", "--algorithm-options.correction.high=4", "--steps", "7"]
    monkeypatch.setattr("sys.argv", ["openmimo", "mopd", "--from", str(path), *own])
    main()
    (config,) = configs
    assert config.steps == 7
    assert config.algorithm_options == {"alpha": 0.5, "correction": {"kind": "icepop", "high": 4}}
    assert algorithm_of(config)[1].correction.high == 4.0
