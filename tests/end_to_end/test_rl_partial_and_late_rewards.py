"""Samples that new weights interrupt, and rewards that arrive after their samples, in real runs with kills."""

from dataclasses import replace

import pytest
import torch
from rl_runs import batches, grpo_config, run, run_and_kill, save_models, sorting_source, source, weights

from openmimo.core.metrics import read_metrics
from openmimo.rl.scheduling.scheduler import DataScheduler


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def partial_config(models, folder):
    return grpo_config(
        models, folder, steps=4, unfinished="partial", updates_per_step=1, max_running=40, dynamic_sampling=False,
        sources=(source(), replace(sorting_source(), max_answer_tokens=40)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def observed(models):
    """An uninterrupted run: its folder, and (version, tokens) of each sample whenever new weights interrupted it."""
    kept, real = {}, DataScheduler.on_partial

    def on_partial(own, group_id, sample):
        if any(sample.loss_mask):
            kept.setdefault(sample.info["sample_id"], []).append((own._version, sample.token_ids.tolist()))
        real(own, group_id, sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataScheduler, "on_partial", on_partial)
        run(partial_config(models, models / "whole"))
    return models / "whole", kept


@pytest.fixture
def uninterrupted(observed):
    return observed[0]


def test_interrupted_samples_keep_their_tokens_and_continue_with_the_new_policy(observed):
    folder, kept = observed
    learned = {sample[0]: sample for samples in batches(folder).values() for sample in samples}
    continued = [name for name in kept if name in learned]
    assert continued
    for name in continued:
        _, token_ids, _, versions, _ = learned[name]
        for version, earlier in kept[name]:
            assert token_ids[: len(earlier)] == earlier
            assert all(own <= version for own in versions[: len(earlier)])
            assert all(own > version for own in versions[len(earlier) :])


@pytest.mark.parametrize(
    ("where", "after_calls"),
    [("rollout", 40), ("update", 2), pytest.param("log", 25, marks=pytest.mark.slow)],
)
def test_a_kill_of_a_partial_run_changes_no_bit(models, uninterrupted, tmp_path, where, after_calls):
    config = partial_config(models, tmp_path / "run")
    run_and_kill(config, where, after_calls)
    run(config)
    assert batches(tmp_path / "run") == batches(uninterrupted)
    whole, again = weights(uninterrupted / "model"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def late_config(models, folder, **changes):
    return grpo_config(
        models, folder, sources=(source(environment="rl_runs:LATE_LETTERS"),), updates_per_step=1, steps=3, **changes
    )


@pytest.mark.parametrize("unfinished", ["abort", "partial"])
def test_others_continue_while_a_reward_is_awaited(models, tmp_path, unfinished, monkeypatch):
    awaited, real = [], DataScheduler.on_reward

    def on_reward(own, late):
        awaited.append(late.sample_id)
        real(own, late)

    monkeypatch.setattr(DataScheduler, "on_reward", on_reward)
    run(late_config(models, tmp_path / "run", unfinished=unfinished))
    learned = [sample for samples in batches(tmp_path / "run").values() for sample in samples]
    assert len(learned) == 3 * 3 * 4
    assert {sample[0] for sample in learned} <= set(awaited)
    assert all(0.0 <= sample[4] <= 1.0 for sample in learned)


def test_after_a_kill_while_rewards_are_awaited_no_token_is_sampled_again(models, tmp_path):
    config = late_config(models, tmp_path / "run", unfinished="partial")
    run_and_kill(config, "reward", 6)
    run(config)
    learned = batches(tmp_path / "run")
    ids = [sample[0] for samples in learned.values() for sample in samples]
    assert sorted(learned) == [0, 1, 2]
    assert len(set(ids)) == len(ids) == 3 * 3 * 4
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "samples" in row]
    assert all(row["scheduler/errors"] == 0 for row in rows)
