"""The policy's optimizer steps (which weights move, and in which direction), and the teachers."""

import copy
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from rl_world import Scripted, policy, request, roll_out, tokenizer, words

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.records import Message
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.rl.agents.environment import EnvResponse
from openmimo.rl.algorithm import open_algorithm
from openmimo.rl.config import MopdConfig, RlSource
from openmimo.rl.learning.packing import packs
from openmimo.rl.learning.policy_trainer import PolicyTrainer, weighted_sum
from openmimo.rl.losses.distillation import reverse_kl
from openmimo.rl.teaching.teachers import Distillation, Teachers
from openmimo.train.config import OptimizerConfig

REINFORCE = weighted_sum(lambda batch: -batch.advantages_N * batch.logprobs_N)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def samples():
    """Eight samples, some of two turns, of a policy with MTP heads."""
    model = policy(0, mtp_heads=2)
    turns = (Message("tool", words(8)),)
    found = roll_out(
        model,
        lambda own: Scripted(EnvResponse(messages=turns)),
        *(request(number, samples=4, max_answer_tokens=16) for number in (0, 1)),
    )
    return annotated(found)


def annotated(samples, weight=0.05):
    """Gives samples advantages of both signs, and small weights."""
    return [
        replace(
            sample,
            advantages=[(-1.0) ** place * (1.0 + 0.1 * number) for place in range(len(sample.token_ids))],
            weights=[weight * is_in for is_in in sample.loss_mask],
        )
        for number, sample in enumerate(samples)
    ]


def gradients_of(model, samples, objective=REINFORCE, **options):
    """Returns the gradients of one update without clipping, and its report. The model does not change."""
    trainer = PolicyTrainer(copy.deepcopy(model), OptimizerConfig(clip_norm=1e9), **options)
    kept = {}

    def keep():
        named = trainer.model.named_parameters()
        kept.update({name: own.grad.clone() for name, own in named if own.grad is not None})

    trainer.optimizer.step = keep
    report = trainer.update(samples, objective, learning_rate=0.0, version=0)
    return kept, report


def test_micro_batches_do_not_change_gradients(samples):
    model, samples = policy(0, mtp_heads=2), samples[2:6]
    whole, report = gradients_of(model, samples, tokens_per_microbatch=100_000, mtp_weight=0.3)
    for size in (1, 200):
        parts, other = gradients_of(model, samples, tokens_per_microbatch=size, mtp_weight=0.3)
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)
        assert other.loss == pytest.approx(report.loss, rel=1e-5)
        assert other.gradient_norm == pytest.approx(report.gradient_norm, rel=1e-4)
        assert other.num_tokens == report.num_tokens == sum(len(sample.token_ids) for sample in samples)
        for name, value in report.diagnostics.items():
            assert other.diagnostics[name] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_domains_share_of_the_gradient_follows_its_weights(samples, factor):
    """Two domains with the same samples; `factor` multiplies the weights of one."""
    once = [replace(sample, domain="once") for sample in samples]
    more = [replace(own, domain="more") for own in annotated(samples, weight=0.05 * factor)]
    for size in (300, 100_000):
        _, report = gradients_of(policy(0), once + more, tokens_per_microbatch=size)
        expected = {"once": 1 / (1 + factor), "more": factor / (1 + factor)}
        assert report.gradient_shares == pytest.approx(expected, rel=1e-4)


def test_what_the_policy_did_not_write_is_in_no_loss(samples):
    """Values at tokens of prompts and tools change nothing; samples without weight on written tokens have no loss."""
    model = policy(0)
    expected, _ = gradients_of(model, samples)
    noisy = [
        replace(
            sample,
            advantages=[a if m else 1e6 for a, m in zip(sample.advantages, sample.loss_mask, strict=True)],
            weights=[w if m else 1e6 for w, m in zip(sample.weights, sample.loss_mask, strict=True)],
        )
        for sample in samples
    ]
    found, _ = gradients_of(model, noisy)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    only_prompts = [replace(sample, weights=[float(not is_in) for is_in in sample.loss_mask]) for sample in samples]
    found, report = gradients_of(model, only_prompts)
    assert report.loss == 0.0
    assert not any(gradient.any() for gradient in found.values())


def test_each_written_token_is_predicted_by_the_row_before_it(samples):
    """Compares with the logits of one sequence at a time."""
    model = policy(0)
    trainer = PolicyTrainer(model, OptimizerConfig(), replay_routing=False)
    for temperature in (1.0, 0.5):
        own = [replace(sample, temperature=temperature) for sample in samples]
        for sample, found in zip(own, trainer.logprobs(own), strict=True):
            with torch.no_grad():
                logprobs = (model.logits(torch.tensor(sample.token_ids)) / temperature).log_softmax(-1)
            rows = enumerate(zip(sample.token_ids, sample.loss_mask, strict=True))
            expected = [float(logprobs[place - 1, token]) if is_in else 0.0 for place, (token, is_in) in rows]
            assert found == pytest.approx(expected, abs=2e-5)


def test_temperatures_may_differ_within_a_pack(samples):
    trainer = PolicyTrainer(policy(0), OptimizerConfig())
    mixed = [replace(sample, temperature=0.5 + 0.25 * (number % 3)) for number, sample in enumerate(samples)]
    apart = [trainer.logprobs([sample])[0] for sample in mixed]
    for found, expected in zip(trainer.logprobs(mixed), apart, strict=True):
        assert found == pytest.approx(expected, abs=2e-5)


def test_a_sample_that_begins_with_a_written_token_is_refused(samples):
    wrong = replace(samples[0], loss_mask=[True, *samples[0].loss_mask[1:]])
    with pytest.raises(ValueError, match="first token"):
        list(packs([wrong], 100, device=torch.device("cpu")))


def test_the_loss_of_the_heads_moves_nothing_but_the_heads(samples):
    model = policy(0, mtp_heads=2)
    without, _ = gradients_of(model, samples, mtp_weight=0.0)
    little, _ = gradients_of(model, samples, mtp_weight=0.01)
    with_heads, _ = gradients_of(model, samples, mtp_weight=5.0)
    heads = {name for name, _ in model.named_parameters() if ".mtp." in name}
    assert with_heads.keys() - without.keys() == heads
    assert all(with_heads[name].any() for name in heads)
    for name, gradient in without.items():
        assert torch.equal(with_heads[name], little[name]), name
        torch.testing.assert_close(with_heads[name], gradient, rtol=1e-4, atol=1e-5)  # the packs differ with heads


def test_the_heads_do_not_change_the_policys_step_through_clipping_either(samples):
    stepped = []
    for weight in (0.01, 50.0):
        model = policy(0, mtp_heads=2)
        trainer = PolicyTrainer(model, OptimizerConfig(clip_norm=0.01), mtp_weight=weight)
        report = trainer.update(samples, REINFORCE, learning_rate=1e-3, version=0)
        stepped.append((dict(model.named_parameters()), report.gradient_norm))
    (little, norm), (much, other_norm) = stepped
    assert norm == other_norm > 0.01
    start = dict(policy(0, mtp_heads=2).named_parameters())
    for name, parameter in little.items():
        assert not torch.equal(parameter, start[name])
        if ".mtp." not in name:
            assert torch.equal(parameter, much[name])


def test_the_heads_learn_what_the_policy_writes(samples):
    model = policy(0, mtp_heads=2)
    trainer = PolicyTrainer(model, OptimizerConfig(), mtp_weight=1.0)
    nothing = weighted_sum(lambda batch: 0.0 * batch.logprobs_N)
    losses = []
    real = trainer._heads_loss
    trainer._heads_loss = lambda *own: losses.append(real(*own)) or losses[-1]
    for _ in range(6):
        trainer.update(samples, nothing, learning_rate=5e-3, version=0)
    assert float(losses[-1].detach()) < 0.8 * float(losses[0].detach())


@pytest.mark.parametrize("algorithm", ["grpo", "cispo", "dr_grpo", "gspo", "rloo"])
def test_rewarded_answers_become_likelier_and_others_less_likely(samples, algorithm):
    model = policy(0)
    plugin, options = open_algorithm(algorithm, {})
    own = [replace(sample, reward=float(number % 2)) for number, sample in enumerate(samples)]
    trainer = PolicyTrainer(model, OptimizerConfig())
    before = [sum(logprobs) for logprobs in trainer.logprobs(own)]
    for version in range(3):
        plugin.annotate(own, options, [[] for _ in own])
        objective = weighted_sum(lambda batch: plugin.token_losses(batch, options))
        report = trainer.update(own, objective, learning_rate=1e-3, version=version)
        assert report.gradient_norm > 0
    after = [sum(logprobs) for logprobs in trainer.logprobs(own)]
    changes = [new - old for new, old in zip(after, before, strict=True)]
    assert sum(changes[1::2]) / 4 > 0.02 > -0.02 > sum(changes[::2]) / 4


def test_old_logprobs_are_those_that_are_given(samples):
    model = policy(0)
    seen = []

    def objective(forward):
        seen.append(forward.batch)
        return forward.batch.logprobs_N.sum() * 0.0

    trainer = PolicyTrainer(model, OptimizerConfig())
    old = [[-0.25 * is_in for is_in in sample.loss_mask] for sample in samples]
    trainer.update(samples, objective, learning_rate=0.0, version=7, old_logprobs=old)
    trainer.update(samples, objective, learning_rate=0.0, version=7)
    assert (seen[0].old_logprobs_N == -0.25).all()
    assert torch.equal(seen[1].old_logprobs_N, seen[1].logprobs_N.detach())
    assert (seen[0].staleness_N == 7).all()


def test_an_update_without_a_sample_to_learn_from_changes_nothing(samples):
    model = policy(0)
    before = copy.deepcopy(model.state_dict())
    trainer = PolicyTrainer(model, OptimizerConfig(), bias_rate=0.1)
    for own in ([], [replace(sample, weights=[0.0] * len(sample.token_ids)) for sample in samples]):
        report = trainer.update(own, REINFORCE, learning_rate=1.0, version=0)
        assert (report.loss, report.gradient_norm, report.num_tokens) == (0.0, 0.0, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Teachers


def save(model: MiMo, folder, own_tokenizer: Tokenizer | None = None):
    save_model(model, folder)
    (own_tokenizer or tokenizer()).save(folder)
    return folder


def child_of(model: MiMo, seed: int) -> MiMo:
    """A model with weights near those of another, like a trained teacher."""
    child, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return child


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student and a teacher trained from it."""
    folder = tmp_path_factory.mktemp("models")
    student = policy(0, ends=2.0)
    save(student, folder / "student")
    save(child_of(student, 1), folder / "teacher")
    return folder


def mopd_config(folders, teachers, **changes):
    sources = tuple(RlSource(name, samples_per_prompt=1, options={"task": {"name": "addition"}}) for name in teachers)
    return MopdConfig(str(folders / "student"), "run", sources, teachers=teachers, **changes)


def open_teaching(folders, student, teachers=None, **changes):
    teachers = teachers or {"math": str(folders / "teacher")}
    return Distillation(mopd_config(folders, teachers, **changes), student, Console(quiet=True))


def distance(student, teacher, samples):
    """The mean full reverse KL on these samples, from whole logits."""
    values = []
    with torch.no_grad():
        for sample in samples:
            ids = torch.tensor(sample.token_ids)
            rows = [place - 1 for place, is_in in enumerate(sample.loss_mask) if is_in]
            values.append(reverse_kl(student.logits(ids)[rows], teacher.logits(ids)[rows]))
    return float(torch.cat(values).mean())


def learn(teaching, trainer, samples, *, rate, version=0):
    algorithm, options = open_algorithm("mopd", {})
    teaching.annotate(samples, trainer, algorithm, options)
    objective = teaching.objective or weighted_sum(lambda batch: algorithm.token_losses(batch, options))
    return trainer.update(
        samples, objective, learning_rate=rate, version=version, pack_key=lambda sample: sample.domain
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"signal": "sampled"},
        {"signal": "full"},
        {"signal": "top_k", "top_k": 16},
        {"signal": "forward"},
        {"signal": "imitate", "writer": "teacher"},
    ],
)
def test_every_signal_brings_the_student_nearer_to_its_teacher(folders, changes):
    student, teacher = policy(0, ends=2.0), child_of(policy(0, ends=2.0), 1)
    teaching = open_teaching(folders, student, **changes)
    trainer = PolicyTrainer(student, OptimizerConfig(), replay_routing="writer" not in changes)
    held_out = roll_out(student, lambda own: Scripted(), request(9, samples=6), seed=9)
    before = distance(student, teacher, held_out)
    assert before > 0.1
    is_sampled = changes["signal"] in ("sampled", "imitate")
    writer = teacher if "writer" in changes else student
    samples = roll_out(
        writer, lambda own: Scripted(), request(1, samples=32 if is_sampled else 8), seed=1, max_sequences=32
    )
    divergences = []
    for _ in range(3):
        learn(teaching, trainer, samples, rate=1e-3)
        divergences.append(teaching.metrics().get("teacher_kl/math"))
    assert distance(student, teacher, held_out) < 0.95 * before
    if changes["signal"] != "imitate":
        assert divergences[0] > divergences[2] > 0.0
    if changes["signal"] in ("sampled", "full"):
        assert divergences[0] == pytest.approx(distance(policy(0, ends=2.0), teacher, samples), rel=0.5)


@pytest.mark.parametrize("signal", ["sampled", "full", "top_k", "forward"])
def test_a_student_is_its_own_teacher_at_first(folders, signal):
    """Advantages and gradients are zero, also if another domain has another teacher."""
    student = policy(0, ends=2.0)
    teaching = open_teaching(folders, student, {"math": "self"}, signal=signal)
    assert teaching.teachers.model("math") is not student
    samples = roll_out(student, lambda own: Scripted(), request(0), request(1))
    kept, report = {}, None
    trainer = PolicyTrainer(student, OptimizerConfig(), tokens_per_microbatch=8192)
    trainer.optimizer.step = lambda: kept.update({name: own.grad for name, own in student.named_parameters()})
    report = learn(teaching, trainer, samples, rate=0.0)
    assert any(sample.weights[-1] > 0 for sample in samples)
    assert abs(report.loss) < 1e-6
    assert report.gradient_norm < 1e-5
    if signal == "sampled":
        assert not any(any(sample.advantages) for sample in samples)
        assert report.gradient_norm == 0.0


def test_the_self_teacher_stays_what_the_student_was(folders):
    student = policy(0, ends=2.0)
    teaching = open_teaching(folders, student, {"math": "self"}, signal="full")
    samples = roll_out(student, lambda own: Scripted(), request(0, samples=8))
    with torch.no_grad():
        noise = torch.randn(student.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        student.lm_head.weight += 0.2 * noise
    moved = distance(student, teaching.teachers.model("math"), samples)
    trainer = PolicyTrainer(student, OptimizerConfig())
    for _ in range(3):
        learn(teaching, trainer, samples, rate=1e-3)
    assert distance(student, teaching.teachers.model("math"), samples) < moved


def teachers_of(folders, paths, domains=None, **options):
    domains = domains or list(paths)
    return Teachers(paths, domains=domains, student=folders / "student", device=torch.device("cpu"), **options)


def test_each_domain_is_scored_by_its_own_teacher(folders):
    student, teacher = policy(0, ends=2.0), child_of(policy(0, ends=2.0), 1)
    teachers = teachers_of(folders, {"math": str(folders / "teacher"), "code": "self"})
    samples = [
        replace(sample, domain=("math", "code")[number % 2], temperature=0.8)
        for number, sample in enumerate(roll_out(student, lambda own: Scripted(), request(0, temperature=0.8)))
    ]
    teachers.score(samples)
    for sample in samples:
        model = teacher if sample.domain == "math" else student
        with torch.no_grad():
            logprobs = (model.logits(torch.tensor(sample.token_ids)) / 0.8).log_softmax(-1)
        for place, is_in in enumerate(sample.loss_mask):
            expected = float(logprobs[place - 1, sample.token_ids[place]]) if is_in else 0.0
            assert sample.teacher_logprobs[place] == pytest.approx(expected, abs=2e-5)


def test_one_checkpoint_is_loaded_once(folders, monkeypatch):
    loaded = []
    from openmimo.rl.teaching import teachers as module

    real = module.load_model
    monkeypatch.setattr(module, "load_model", lambda path, **own: loaded.append(path) or real(path, **own))
    same = folders / "other" / ".." / "teacher"
    (folders / "other").mkdir(exist_ok=True)
    paths = {"a": str(folders / "teacher"), "b": str(same), "c": "self", "d": str(folders / "student")}
    teachers = teachers_of(folders, paths)
    assert len(loaded) == 2
    assert teachers.model("a") is teachers.model("b")
    assert teachers.model("c") is teachers.model("d")
    assert not any(parameter.requires_grad for parameter in teachers.model("a").parameters())


def test_teachers_that_take_turns_score_as_resident_ones_and_one_is_in_memory(folders):
    paths = {"math": str(folders / "teacher"), "code": "self"}
    samples = roll_out(policy(0, ends=2.0), lambda own: Scripted(), request(0))
    samples = [replace(sample, domain=("math", "code")[number % 2]) for number, sample in enumerate(samples)]
    teachers_of(folders, paths).score(samples)
    expected = [sample.teacher_logprobs.copy() for sample in samples]
    turns = teachers_of(folders, paths, placement="turns")
    gone = weakref.ref(turns.model("math"))
    turns.score(samples)
    for sample, logprobs in zip(samples, expected, strict=True):
        np.testing.assert_array_equal(sample.teacher_logprobs, logprobs)
    assert gone() is None, "the first teacher is still in memory"


def test_domains_and_teachers_must_match(folders):
    with pytest.raises(ConfigError, match="without a teacher: code"):
        teachers_of(folders, {"math": "self"}, ["math", "code"])
    with pytest.raises(ConfigError, match="of no domain: code"):
        teachers_of(folders, {"math": "self", "code": "self"}, ["math"])


def test_a_teacher_of_other_texts_is_refused(folders, tmp_path):
    model = policy(0)
    other = Tokenizer.train(["completely other words, of no use at all"] * 3, vocab_size=316)
    save(model, tmp_path / "vocabulary", other)
    with pytest.raises(CheckpointError, match="'math'.*another vocabulary"):
        teachers_of(folders, {"math": str(tmp_path / "vocabulary")})
    save(model, tmp_path / "template")
    path = tmp_path / "template" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|im_start|>user", "<|im_start|>asker"))
    with pytest.raises(CheckpointError, match="'math'.*another chat template"):
        teachers_of(folders, {"math": str(tmp_path / "template")})
