"""From problems to samples: every token has its mask, log-probability, version and routes."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from rl_world import Scripted, finish, open_rollouts, pages_in_use, policy, request, roll_out, tokenizer, words

from openmimo.core.records import Message
from openmimo.core.sample_files import read_sample, write_sample
from openmimo.core.samples import ArrayFile
from openmimo.data.chat.template import encode_chat
from openmimo.rl.agents.environment import EnvResponse
from openmimo.rl.agents.episode_calls import EpisodeCalls
from openmimo.rl.learning.policy_trainer import PolicyTrainer
from openmimo.rl.losses.tokens import mismatch
from openmimo.rl.rollouts.engine import turn_ids
from openmimo.train.config import OptimizerConfig

TOOL_TURNS = (Message("tool", "3"), Message("tool", "a <|im_end|> is text here"))
USER_TURN = (Message("user", words(12)),)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return policy()


@contextmanager
def episode_calls(threads):
    """Threads for episodes, closed at the end of the block."""
    calls = EpisodeCalls(threads=threads)
    yield calls
    calls.close()


def open_many_turns(own):
    """Episodes with turns of tools, turns of users, and texts inserted inside a turn."""
    if own.problem.content % 2:
        episode = Scripted(EnvResponse(text="= 3, so"), EnvResponse(text=" and"), EnvResponse(messages=USER_TURN))
        episode.stop = (" ",)
        return episode
    return Scripted(EnvResponse(messages=TOOL_TURNS), EnvResponse(messages=USER_TURN), reward=0.5)


def check_complete(sample, model):
    """Checks that every list has an entry for every token, and that every token that was read has its routes."""
    length, moe = len(sample.token_ids), model.config.moe
    assert len(sample.loss_mask) == len(sample.logprobs) == len(sample.versions) == length
    for written, logprob, version in zip(sample.loss_mask, sample.logprobs, sample.versions, strict=True):
        assert (logprob <= 0.0 and version >= 0) if written else (logprob == 0.0 and version == -1)
    assert sample.routed_experts.shape == (length - 1, len(model.routers()), moe.experts_per_token)
    assert sample.routed_experts.dtype == np.uint8
    assert sample.routed_experts.max() < moe.num_experts
    assert sample.loss_mask[-1]


def check_agrees(samples, model):
    """Checks that engine and trainer, with the same float32 weights, compute the same log-probabilities."""
    trainer = PolicyTrainer(model, OptimizerConfig(), tokens_per_microbatch=300)
    for sample, own in zip(samples, trainer.logprobs(samples), strict=True):
        ours, theirs = torch.tensor(own), torch.tensor(sample.logprobs)
        metrics = mismatch(ours[sample.loss_mask], theirs[sample.loss_mask])
        assert metrics["logprob_difference_max"] <= 1e-5
        assert metrics["extreme_ratio_share_2"] == 0.0
        assert not ours[~sample.loss_mask].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_of_one_turn_are_complete_and_the_trainer_agrees(model, temperature):
    requests = [request(number, temperature=temperature) for number in range(3)]
    samples = roll_out(model, lambda own: Scripted(question=words(3 * own.problem.content + 2)), *requests)
    assert len(samples) == 12
    for sample in samples:
        check_complete(sample, model)
        start = sample.prompt_length
        assert all(sample.loss_mask[start:])
        assert sample.temperature == temperature
        assert sample.domain == "math"
        assert sample.group == sample.info["sample_id"].rpartition("/")[0]
        assert sample.finish_reason == ("stop" if sample.token_ids[-1] in tokenizer().eos_token_ids else "length")
        assert sample.finish_reason == "stop" or sample.num_answer_tokens == 24
        assert sample.reward == 1.0
    assert "stop" in {sample.finish_reason for sample in samples}
    assert len({tuple(sample.token_ids) for sample in samples}) > 6
    check_agrees(samples, model)


def test_the_prompt_is_that_of_the_chat_format(model):
    sample = roll_out(model)[0]
    prompt = encode_chat(tokenizer(), [Message("user", "add 1 and 2")])
    assert sample.token_ids[: sample.prompt_length].tolist() == prompt


def test_episodes_hear_what_was_written_without_the_end_of_the_turn(model):
    episodes = []

    def open_episode(own):
        episodes.append(open_many_turns(own))
        return episodes[-1]

    samples = roll_out(model, open_episode, request(0, max_answer_tokens=60), request(1, max_answer_tokens=60))
    for episode, sample in zip(episodes, samples, strict=True):
        turns, current = [], []
        for token, written in zip([*sample.token_ids, 0], [*sample.loss_mask, False], strict=True):
            if written:
                current.append(token)
            elif current:
                turns.append(current)
                current = []
        ended = [turn[:-1] if turn[-1] in tokenizer().eos_token_ids else turn for turn in turns]
        if not episode.stop:  # with stop strings, the episode's text may begin where the policy stopped
            assert episode.heard == [tokenizer().decode(turn, skip_special=False) for turn in ended]
        assert sample.info["turns"] == len(episode.heard)
        assert episode.num_closed == 1


def test_samples_of_many_turns_are_complete_and_the_trainer_agrees(model):
    samples = roll_out(model, open_many_turns, *(request(number, samples=6, max_answer_tokens=60) for number in (0, 1)))
    for sample in samples:
        check_complete(sample, model)
        assert sample.num_answer_tokens <= 60
    assert max(sample.info["turns"] for sample in samples) == 4
    check_agrees(samples, model)
    inside = [sample for sample in samples if sample.group == "math/1" and sample.info["turns"] > 1]
    said = tokenizer().encode("= 3, so")
    for sample in inside:
        first = sample.prompt_length
        start = sample.loss_mask.tolist().index(False, first)
        assert sample.token_ids[start : start + len(said)].tolist() == said
        assert sample.loss_mask[start : start + len(said) + 1].tolist() == [False] * len(said) + [True]
    assert inside


def test_turns_are_those_of_the_whole_conversation(model):
    for turns in (TOOL_TURNS, USER_TURN, (*TOOL_TURNS, *USER_TURN)):
        before = [Message("system", "be brief"), Message("user", "add"), Message("assistant", words(5))]
        prefix = encode_chat(tokenizer(), before, add_generation_prompt=False)
        assert prefix + turn_ids(tokenizer(), turns) == encode_chat(tokenizer(), [*before, *turns])
    expected = [turn_ids(tokenizer(), turns) for turns in (TOOL_TURNS, USER_TURN)]
    for sample in roll_out(model, open_many_turns, request(0, max_answer_tokens=80, samples=6)):
        assert inserted_runs(sample) == expected[: sample.info["turns"] - 1]


def inserted_runs(sample):
    """Returns the tokens that were inserted between the policy's turns."""
    start = sample.prompt_length
    runs, before = [], True
    for token, written in zip(sample.token_ids[start:], sample.loss_mask[start:], strict=True):
        if not written:
            runs += [[]] if before else []
            runs[-1].append(token)
        before = written
    return runs


def test_the_batch_does_not_decide_the_tokens(model):
    requests = [request(number, samples=3, max_answer_tokens=30) for number in range(2)]
    several = [roll_out(model, open_many_turns, *requests, max_sequences=most, seed=3) for most in (1, 4, 16)]
    several.append(roll_out(model, open_many_turns, *reversed(requests), seed=3))
    for samples in several[1:]:
        for sample, expected in zip(samples, several[0], strict=True):
            assert sample.info["sample_id"] == expected.info["sample_id"]
            assert np.array_equal(sample.token_ids, expected.token_ids)
            assert np.array_equal(sample.loss_mask, expected.loss_mask)
            assert np.array_equal(sample.routed_experts, expected.routed_experts)
            assert sample.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    other = roll_out(model, open_many_turns, *requests, seed=4)
    assert [sample.token_ids.tolist() for sample in other] != [sample.token_ids.tolist() for sample in several[0]]


def test_the_same_requests_again_are_the_same_to_the_last_bit(model):
    one, other = (roll_out(model, open_many_turns, request(0), request(1)) for _ in range(2))
    assert one == other


def test_versions_are_those_of_the_weights_that_sampled():
    model = policy(ends=0.5)  # turns are longer than the polls before the update
    rollouts = open_rollouts(model, lambda own: Scripted())
    rollouts.update_weights(4)
    rollouts.submit(request(samples=2))
    for _ in range(5):
        rollouts.poll()
    rollouts.update_weights(5)
    samples = list(finish(rollouts).values())
    written = [[version for version in sample.versions if version >= 0] for sample in samples]
    assert all(versions == sorted(versions) for versions in written)
    assert {version for versions in written for version in versions} == {4, 5}
    for sample in samples:
        check_complete(sample, model)


class Replaced(Scripted):
    """An episode that another one succeeds after its last response."""

    def __init__(self, *answers, following=None, **options):
        super().__init__(*answers, **options)
        self.following = following

    def successor(self):
        return self.following


def test_a_context_that_is_replaced_goes_on_and_all_of_it_is_learned_from(tmp_path):
    model = policy(ends=60.0)  # turns end at once
    last = Scripted(EnvResponse(messages=TOOL_TURNS), question="go on", reward=0.25)
    middle = Replaced(EnvResponse(messages=TOOL_TURNS), following=last, question="go on, then")
    rollouts = open_rollouts(model, lambda own: Replaced(following=middle, reward=RuntimeError("not asked")))
    rollouts.submit(request(samples=1, max_answer_tokens=64))
    (sample,) = finish(rollouts).values()
    contexts = sample.contexts()
    assert [len(inserted_runs(context)) for context in contexts] == [0, 1, 1]
    assert [context.finish_reason for context in contexts] == ["context", "context", "stop"]
    assert {(context.reward, context.group, context.episode) for context in contexts} == {(0.25, "math/0", "math/0/0")}
    for context, question in zip(contexts, ("add 1 and 2", "go on, then", "go on"), strict=True):
        assert question in tokenizer().decode(context.token_ids)
        check_complete(context, model)
    for context, own in zip(contexts, PolicyTrainer(model, OptimizerConfig()).logprobs(contexts), strict=True):
        assert own == pytest.approx(context.logprobs, abs=1e-4)  # the logits of the end-of-turn token are large
    assert last.num_closed == 1
    assert pages_in_use(rollouts) == 0
    file = ArrayFile(tmp_path / "arrays")
    assert read_sample(json.loads(json.dumps(write_sample(sample, file))), file) == sample


def test_contexts_of_one_prompt_are_drawn_apart():
    last = Scripted()
    rollouts = open_rollouts(policy(ends=10.0), lambda own: Replaced(following=Replaced(following=last)))
    rollouts.submit(request(samples=1, max_answer_tokens=64, temperature=5.0))
    (sample,) = finish(rollouts).values()
    first, second, _ = (context.token_ids.tolist() for context in sample.contexts())
    assert first != second


def test_what_goes_on_after_it_was_cancelled_is_closed():
    asked, go_on, last = threading.Event(), threading.Event(), Scripted()

    class Slow(Replaced):
        def respond(self, text):
            asked.set()
            go_on.wait(30)
            return EnvResponse()

    with episode_calls(1) as calls:
        rollouts = open_rollouts(policy(ends=60.0), lambda own: Slow(following=last), calls=calls)
        rollouts.submit(request(samples=1))
        while not asked.is_set():
            rollouts.poll()
        rollouts.cancel(["math/0/0"])
        go_on.set()
    assert last.num_closed == 1


def test_the_token_limit_is_that_of_all_contexts():
    endless = Replaced()
    endless.following = endless
    rollouts = open_rollouts(policy(ends=60.0), lambda own: endless)
    rollouts.submit(request(samples=1, max_answer_tokens=7))
    (sample,) = finish(rollouts).values()
    assert sum(context.num_answer_tokens for context in sample.contexts()) == 7
    assert len(sample.earlier) > 1


def test_rewards_need_not_be_floats():
    rollouts = open_rollouts(policy(), lambda own: Scripted(reward=True))
    rollouts.submit(request(samples=2, max_answer_tokens=1))
    assert [sample.reward for sample in finish(rollouts).values()] == [1.0, 1.0]


@pytest.mark.parametrize(
    "episode",
    [
        lambda: Scripted(RuntimeError("the tool is broken")),
        lambda: Scripted(reward=RuntimeError("the checker is broken")),
        lambda: Scripted(EnvResponse(messages=TOOL_TURNS), RuntimeError("at the second turn")),
    ],
)
def test_an_episode_that_fails_makes_an_error_and_nothing_else(episode):
    model = policy(ends=60.0)  # turns end at once
    opened = []

    def open_episode(own):
        opened.append(episode() if own.problem.content == 0 else Scripted())
        return opened[-1]

    rollouts = open_rollouts(model, open_episode)
    for number in (0, 1):
        rollouts.submit(request(number, samples=2, max_answer_tokens=64))
    failed, fine = [], []
    for sample in finish(rollouts).values():
        (failed if sample.group == "math/0" else fine).append(sample)
    assert all(sample.finish_reason == "error" and np.isnan(sample.reward) for sample in failed)
    assert all("broken" in sample.info["error"] or "second" in sample.info["error"] for sample in failed)
    assert all(sample.finish_reason == "stop" and sample.reward == 1.0 for sample in fine)
    assert [one.num_closed for one in opened] == [1] * 4
    assert pages_in_use(rollouts) == 0


def test_cancelled_samples_give_back_pages_and_episodes(model):
    opened = []

    def open_episode(own):
        opened.append(open_many_turns(own))
        return opened[-1]

    rollouts = open_rollouts(model, open_episode, max_sequences=3)
    for number in (0, 1):
        rollouts.submit(request(number, samples=4))
    for _ in range(12):  # some samples run, some wait, some are between two turns
        rollouts.poll()
    assert pages_in_use(rollouts) > 0
    rollouts.cancel([f"math/{number}/{index}" for number in (0, 1) for index in range(4)] + ["math/7/0"])
    assert rollouts.num_running == 0
    assert rollouts.poll() == []
    assert pages_in_use(rollouts) == 0
    assert all(one.num_closed == 1 for one in opened)


def test_slow_episodes_answer_in_threads_while_others_go_on(model):
    may_answer, threads = threading.Event(), set()

    class Slow(Scripted):
        def respond(self, text):
            threads.add(threading.current_thread().name)
            may_answer.wait(30)
            return super().respond(text)

    with episode_calls(8) as calls:
        rollouts = open_rollouts(
            model, lambda own: Slow(EnvResponse(messages=TOOL_TURNS)) if own.problem.content else Scripted(),
            calls=calls,
        )  # fmt: skip
        rollouts.submit(request(1, samples=3, max_answer_tokens=60))
        rollouts.submit(request(0, samples=3))
        found = []
        while rollouts.num_running > 3:
            found += rollouts.poll()
        assert {sample.group for sample in found} == {"math/0"}
        may_answer.set()
        slow = finish(rollouts)
    assert len(slow) == 3
    assert threads and all(name.startswith("episode") for name in threads)
    instant = roll_out(
        model, lambda own: Scripted(EnvResponse(messages=TOOL_TURNS)), request(1, samples=3, max_answer_tokens=60)
    )
    assert [own.token_ids.tolist() for own in slow.values()] == [own.token_ids.tolist() for own in instant]


def test_what_is_cancelled_before_it_could_answer_never_does(model):
    may_answer = threading.Event()
    opened = []

    class Slow(Scripted):
        def respond(self, text):
            may_answer.wait(30)
            return super().respond(text)

    def open_episode(own):
        opened.append(Slow())
        return opened[-1]

    with episode_calls(1) as calls:
        rollouts = open_rollouts(model, open_episode, calls=calls)
        rollouts.submit(request(samples=4))
        while any(run.pending is None for run in rollouts._runs.values()):
            rollouts.poll()
        rollouts.cancel([f"math/0/{index}" for index in range(4)])
        may_answer.set()
    assert sum(len(one.heard) for one in opened) == 1  # the call that had begun
    assert [one.num_closed for one in opened] == [1] * 4
    assert pages_in_use(rollouts) == 0


def cut(sample, num_written):
    """Returns the sample as it is known after `num_written` written tokens."""
    end = sample.prompt_length + num_written
    lists = ("token_ids", "loss_mask", "logprobs", "versions")
    values = {name: getattr(sample, name)[:end] for name in lists}
    return replace(sample, **values, routed_experts=sample.routed_experts[: end - 1], finish_reason="abort")


@pytest.mark.parametrize("num_written", [1, 6])
def test_a_partial_goes_on_as_if_it_had_not_been_cut(num_written):
    model = policy(ends=1.0)
    single = roll_out(model, lambda own: Scripted(), request(temperature=0.0))[0]
    partial = cut(single, num_written)
    # recorded values of the partial are kept, not recomputed
    partial.logprobs[-1] -= 0.5
    partial.routed_experts = partial.routed_experts.copy()
    partial.routed_experts[-1] = 7
    rollouts = open_rollouts(model, lambda own: Scripted())
    rollouts.update_weights(3)
    rollouts.submit(request(temperature=0.0, samples=1, partials={"math/0/0": partial}))
    (stitched,) = finish(rollouts).values()
    check_complete(stitched, model)
    end = len(partial.token_ids)
    assert np.array_equal(stitched.token_ids, single.token_ids)
    assert np.array_equal(stitched.loss_mask, single.loss_mask)
    assert np.array_equal(stitched.logprobs[:end], partial.logprobs)
    assert stitched.logprobs[end:] == pytest.approx(single.logprobs[end:], abs=1e-5)
    assert stitched.versions.tolist() == [*partial.versions, *[3] * (len(single.token_ids) - end)]
    assert np.array_equal(stitched.routed_experts[: end - 1], partial.routed_experts)
    assert np.array_equal(stitched.routed_experts[end - 1 :], single.routed_experts[end - 1 :])
    assert stitched.num_answer_tokens == 24
    assert (stitched.finish_reason, stitched.reward) == ("length", 1.0)


def test_the_episode_of_a_partial_hears_the_whole_turn():
    model = policy(ends=1.0)
    single = roll_out(model, lambda own: Scripted(), request(temperature=0.0))[0]
    episode = Scripted()
    partial = cut(single, 6)
    roll_out(model, lambda own: episode, request(temperature=0.0, samples=1, partials={"math/0/0": partial}))
    assert episode.heard == [tokenizer().decode(single.token_ids[single.prompt_length :], skip_special=False)]


def test_partials_that_no_new_episode_can_take_start_over(model):
    whole = roll_out(model, open_many_turns, *(request(number, samples=2, max_answer_tokens=60) for number in range(2)))
    for sample in whole:
        group = int(sample.group.rpartition("/")[2])
        cuts = [3] if group else [place for place in (len(sample.token_ids) - 1,) if sample.info["turns"] > 1]
        for end in cuts:
            lists = ("token_ids", "loss_mask", "logprobs", "versions")
            partial = replace(sample, **{name: getattr(sample, name)[:end] for name in lists})
            partial.routed_experts = partial.routed_experts[: end - 1]
            sample_id = sample.info["sample_id"]
            own = replace(request(group, max_answer_tokens=60), sample_ids=(sample_id,), partials={sample_id: partial})
            (again,) = roll_out(model, open_many_turns, own)
            assert np.array_equal(again.token_ids, sample.token_ids)
            assert again.reward == sample.reward


def test_an_answer_that_leaves_no_room_is_not_put_in(model):
    long = EnvResponse(messages=(Message("user", words(400)),))
    model = policy(ends=60.0)
    for sample in roll_out(model, lambda own: Scripted(long, reward=0.25), request(max_answer_tokens=500)):
        check_complete(sample, model)
        assert sample.finish_reason == "length"
        assert sample.reward == 0.25


def test_a_prompt_that_fills_the_context_ends_at_once(model):
    (sample,) = roll_out(model, lambda own: Scripted(question=words(400), reward=0.0), request(samples=1))
    assert sample.num_answer_tokens == 0
    assert sample.finish_reason == "too_long"
    assert sample.info["prompt_tokens"] > sample.info["limit"] == model.config.max_positions - 1


def test_an_episode_that_opens_too_late_is_closed(model):
    may_open, late, others = threading.Event(), Scripted(), set(threading.enumerate())

    def open_episode(own):
        if own.problem.id == "p1":
            may_open.wait(30)
            return late
        return Scripted()

    calls = EpisodeCalls(seconds=0.2)
    rollouts = open_rollouts(model, open_episode, calls=calls)
    rollouts.submit(request(1, samples=1))
    rollouts.submit(request(0, samples=2))
    samples = finish(rollouts)
    assert samples["math/1/0"].finish_reason == "error" and samples["math/1/0"].info["error_kind"] == "timeout"
    assert [samples[f"math/0/{index}"].reward for index in range(2)] == [1.0, 1.0]
    assert calls.num_hung == 1
    may_open.set()
    rollouts.close()
    calls.close()
    for thread in set(threading.enumerate()) - others:
        thread.join(10)
    assert late.num_closed == 1 and calls.num_hung == 0
