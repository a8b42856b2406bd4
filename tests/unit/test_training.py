"""Schedules, loss, optimizer state; a run that is killed and resumed equals the uninterrupted run bit for bit."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from forked import start_command
from safetensors.torch import load_file

from openmimo.core import config as config_io
from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.load_trace import TRACE_FILE, read_load_trace
from openmimo.core.metrics import TimeLeft, duration_text, read_metrics
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.data.loader import Loader
from openmimo.data.tokenizer import Tokenizer
from openmimo.kernels import operations
from openmimo.model.context import PackedContext
from openmimo.model.heads import micro_batch
from openmimo.model.hf import load_model
from openmimo.train import checkpoint as checkpoint_module
from openmimo.train.checkpoint import Checkpoints, find_damage
from openmimo.train.config import CheckpointConfig, EvaluationConfig, Phase, PretrainConfig, TokenizerConfig
from openmimo.train.loss import evaluate, training_loss
from openmimo.train.optim import (
    GradientReport,
    build_optimizer,
    clip_gradients,
    learning_rate,
    parameter_groups,
    place_of,
    rows_of_step,
    tokens_left,
)
from openmimo.train.pretrain import pretrain
from openmimo.train.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_config(folder: Path, **changes) -> PretrainConfig:
    """Two short stages: the second has a longer context, a new RoPE base and more MTP heads."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for number in range(40):
            words = " ".join(f"word{(number * 7 + place * 3) % 50}" for place in range(150))
            (text / f"{number}.txt").write_text(words)
    mixture = MixtureConfig(
        (
            SourceConfig("text_folder", options={"path": str(text)}),
            SourceConfig("repeats", options={"alphabet": "characters", "min_length": 32, "max_period": 10}),
        ),
        validation_fraction=0.2,
    )
    first = Phase(
        "short",
        steps=6,
        sequence_length=32,
        global_batch_size=4,
        learning_rate=1e-3,
        end_learning_rate=1e-4,
        mixture=mixture,
    )
    second = replace(
        first, name="long", steps=4, sequence_length=64, global_batch_size=2, full_rope_theta=4e4, mtp_heads=2
    )
    return PretrainConfig(
        run_folder=str(folder / "run"),
        stages=(first, second),
        device="cpu",
        dtype="float32",
        threads=1,
        micro_batch_size=2,
        log_every_steps=1,
        tokenizer=TokenizerConfig(train_megabytes=0.1),
        checkpoints=CheckpointConfig(every_steps=2, keep_last=3),
        evaluation=EvaluationConfig(every_steps=5, batches=1),
        **changes,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


class TestSchedule:
    stage = Phase(
        "s", steps=100, sequence_length=8, global_batch_size=64, learning_rate=1.0, end_learning_rate=0.1,
        mixture=MixtureConfig((SourceConfig("x"),)), warmup_steps=10, constant_steps=40, initial_batch_size=16,
        batch_warmup_steps=20,
    )  # fmt: skip

    def test_learning_rate(self):
        rates = [learning_rate(self.stage, step) for step in range(100)]
        assert rates[0] == pytest.approx(0.1)
        assert rates[9:50] == [1.0] * 41
        assert rates[75] == pytest.approx(0.55)
        assert rates[99] == pytest.approx(0.1, rel=0.01)
        assert rates[50:] == sorted(rates[50:], reverse=True)

    def test_a_linear_decay_and_a_weight_decay_of_its_own(self):
        rates = [learning_rate(replace(self.stage, decay="linear"), step) for step in range(100)]
        assert rates[50] == 1.0
        assert rates[75] == pytest.approx(0.55)
        assert rates[60] - rates[59] == pytest.approx(rates[99] - rates[98]) == pytest.approx(-0.9 / 50)

    def test_rows(self):
        assert [rows_of_step(self.stage, step) for step in (0, 10, 20, 99)] == [16, 40, 64, 64]

    def test_rows_in_multiples(self):
        stage = replace(self.stage, batch_multiple=16)
        assert [rows_of_step(stage, step) for step in (0, 3, 4, 10, 19, 20)] == [16, 16, 32, 32, 64, 64]

    def test_places(self):
        stages = (self.stage, replace(self.stage, name="t"))
        assert place_of(99, stages).stage_index == 0
        assert (place_of(100, stages).stage_index, place_of(100, stages).stage_step) == (1, 0)

    def test_contradictions_are_refused(self):
        with pytest.raises(ConfigError, match="more than"):
            replace(self.stage, warmup_steps=90)
        with pytest.raises(ConfigError, match="together"):
            replace(self.stage, initial_batch_size=None)


def test_heads_that_share_a_call_have_the_same_losses_and_gradients(monkeypatch):
    """A backend of an accelerator serves all heads with one call of the output head."""
    model, lengths = tiny_model(mtp_heads=2), (20, 1, 9)
    batch = micro_batch(torch.randint(0, 160, (30,)), lengths, torch.rand(30) > 0.3, 2)

    def measure():
        model.zero_grad()
        loss, shares = training_loss(
            model, batch, PackedContext(lengths), label_counts=batch.label_counts(), mtp_weight=0.3
        )
        loss.backward()
        return [loss.detach(), shares, *(parameter.grad for parameter in model.parameters())]

    def joined(hidden, weight, labels, weights):
        logprobs = separate.logprobs(hidden, weight, labels, 1.0)
        return -(weights * logprobs).sum(), logprobs.detach()

    apart = measure()
    separate = operations.TOKEN_LOSS.best(operations.TokenLossNeed(torch.float32, True))[1].run
    monkeypatch.setattr(operations, "_functions", lambda hidden: replace(separate, joined=joined))
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    for ours, theirs in zip(measure(), apart, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert len(calls) == 1


def test_loss_is_the_definition():
    """Next token within documents, plus the weighted mean of the heads; losses of micro-batches add up."""
    model = tiny_model(mtp_heads=2)
    lengths = (20, 1, 9)
    tokens = torch.randint(0, 160, (30,))
    mask = torch.rand(30) > 0.3
    batch = micro_batch(tokens, lengths, mask, 2)
    loss, shares = training_loss(
        model, batch, PackedContext(lengths), label_counts=batch.label_counts(), mtp_weight=0.3
    )
    context = PackedContext(lengths)
    hidden = model(tokens, context)
    means = []
    for head in range(3):
        if head:
            shifted = torch.zeros(30, dtype=torch.int64)
            for start, end in ((0, 20), (20, 21), (21, 30)):
                for i in range(start, end - head):
                    shifted[i] = tokens[i + head]
            states = model.mtp(head - 1, hidden, shifted, context)
        else:
            states = hidden.post_norm_TD
        logprobs = model.head(states).log_softmax(-1)
        losses = [
            -logprobs[i, tokens[i + 1 + head]]
            for start, end in ((0, 20), (20, 21), (21, 30))
            for i in range(start, end - 1 - head)
            if mask[i + 1 + head]
        ]
        means.append(torch.stack(losses).mean())
    assert torch.allclose(shares, torch.stack(means), atol=1e-5)
    assert torch.allclose(loss, means[0] + 0.3 * (means[1] + means[2]) / 2, atol=1e-5)


def test_decay_is_for_matrices_and_zeros_are_counted():
    model = tiny_model()
    decayed, free = parameter_groups(model)
    assert "model.layers.1.mlp.experts.gate_up_proj" in decayed
    assert "model.layers.1.self_attn.attention_sink_bias" in free
    assert len(decayed) + len(free) == len(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.model.norm.weight.grad.zero_()
    total = sum(parameter.numel() for parameter in model.parameters())
    report = clip_gradients(model, 1.0)
    assert report.num_zeros == 64
    assert report.norm == pytest.approx((total - 64) ** 0.5, rel=1e-5)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert norm == pytest.approx(1.0, rel=1e-4)
    assert build_optimizer(model, run_config_optimizer()).param_groups[1]["weight_decay"] == 0.0


def run_config_optimizer():
    from openmimo.train.config import OptimizerConfig

    return OptimizerConfig()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run, shared by the tests below."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    pretrain(run_config(folder, expert_trace=True))
    return folder


def test_a_run_leaves_what_it_says(finished):
    run = finished / "run"
    rows = read_metrics(run / "metrics.jsonl")
    train = [row for row in rows if "loss/main" in row]
    assert [row["step"] for row in train] == list(range(1, 11))
    assert train[-1]["loss/main"] < train[0]["loss/main"]
    assert {
        "loss/mtp_0",
        "gradient/num_zeros",
        "matmul_utilization",
        "flops",
        "tokens_per_second",
        "expert_load/by_layer",
    } <= set(train[0])
    assert "loss/mtp_1" in train[-1]
    assert "loss/mtp_1" not in train[0]
    assert sum(train[0]["expert_load/by_layer"][0]) == 4 * 32 * 2
    trace = read_load_trace(run)
    assert trace.counts.tolist() == [row["expert_load/by_layer"] for row in train]
    assert trace.steps.tolist() == list(range(1, 11)) and trace.header.layers == (1, 2, 3, 4, 5)
    assert trace.header.dtype == "uint8"  # at most 128 tokens a step
    validation = [row for row in rows if "validation/main" in row]
    assert {"validation/acceptance_0", "validation/loss_by_position"} <= set(validation[0])
    assert (run / "report.html").read_text().count("<img") >= 5
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-00000006", "step-00000008", "step-00000010",
    ]  # fmt: skip
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 2
    assert config["rope_theta"] == 4e4


@pytest.mark.parametrize("kill_at_step", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(finished, tmp_path, kill_at_step, without_figures):
    """SIGKILL inside a stage, and at the boundary of two stages."""
    (tmp_path / "text").mkdir()
    for file in (finished / "text").iterdir():
        (tmp_path / "text" / file.name).write_text(file.read_text())
    config = run_config(finished)
    config = replace(config, run_folder=str(tmp_path / "run"), loader_workers=2)
    path = tmp_path / "start.json"
    config_io.save(config, path)
    process = start_command(["pretrain", "--from", str(path)], tmp_path / "errors")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if metrics.exists() and any(row["step"] >= kill_at_step for row in read_metrics(metrics)):
            break
        time.sleep(0.01)
    process.kill()
    process.join()
    pretrain(config)
    expected = weights(finished / "run" / "model")
    resumed = weights(tmp_path / "run" / "model")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    steps = [row["step"] for row in read_metrics(metrics) if "loss/main" in row]
    assert steps == list(range(1, 11))
    losses = [row["loss/main"] for row in read_metrics(finished / "run" / "metrics.jsonl") if "loss/main" in row]
    assert [row["loss/main"] for row in read_metrics(metrics) if "loss/main" in row] == losses


def test_a_damaged_newest_checkpoint_is_reported_and_passed_over(finished, tmp_path, capsys, without_figures):
    import shutil

    shutil.copytree(finished / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000010"
    data = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(data[:-10])
    assert "does not match" in find_damage(newest)
    pretrain(replace(run_config(finished), run_folder=str(tmp_path / "run")))
    assert "step-00000010" in capsys.readouterr().err
    assert find_damage(newest) is None
    expected, again = weights(finished / "run" / "model"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(finished, tmp_path, monkeypatch, capsys, without_figures):
    real, calls = checkpoint_module.save_file, []

    def full_now_and_then(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", full_now_and_then)
    pretrain(replace(run_config(finished), run_folder=str(tmp_path / "run")))
    assert "No space left" in capsys.readouterr().err
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert "step-00000004" not in names
    assert not [name for name in names if name.startswith(".")]
    assert all(
        torch.equal(t, weights(tmp_path / "run" / "model")[n]) for n, t in weights(finished / "run" / "model").items()
    )


def test_a_checkpoint_that_cannot_be_written_names_itself(tmp_path, monkeypatch, finished):
    from openmimo.data.tokenizer import Tokenizer
    from openmimo.train.checkpoint import Progress

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    model = tiny_model()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(CheckpointError, match="step-00000000"):
        checkpoints.save(
            model, {}, Tokenizer.load(finished / "run" / "model"),
            Progress.beginning(),
        )  # fmt: skip
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_another_config_does_not_continue_a_run(finished):
    with pytest.raises(ConfigError, match="seed"):
        pretrain(replace(run_config(finished), seed=1))


def test_a_finished_run_takes_more_steps_in_its_last_stage(finished, tmp_path, without_figures):
    """With a constant learning rate, the result is that of a run with all steps from the start."""
    base = run_config(finished)
    stages = tuple(replace(stage, steps=2, end_learning_rate=stage.learning_rate) for stage in base.stages)
    longer = (stages[0], replace(stages[1], steps=5))
    grown, whole = (
        replace(base, run_folder=str(tmp_path / name), stages=longer, expert_trace=True) for name in ("grown", "whole")
    )
    pretrain(replace(grown, stages=stages))
    assert pretrain(grown) == tmp_path / "grown" / "model"
    pretrain(whole)
    assert (tmp_path / "grown" / TRACE_FILE).read_bytes() == (tmp_path / "whole" / TRACE_FILE).read_bytes()
    first, second = (weights(tmp_path / name / "model") for name in ("grown", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    with pytest.raises(ConfigError, match="stages.1.steps was 5 and is now 2"):
        pretrain(replace(grown, stages=stages))
    with pytest.raises(ConfigError, match="stages.0.steps was 2 and is now 3"):
        pretrain(replace(grown, stages=(replace(longer[0], steps=3), longer[1])))


def test_the_time_left_is_stated_once_for_long_work():
    time_left = TimeLeft(2)
    assert [time_left.after_step(seconds, 10, 900) for seconds in (50.0, 1.0, 3.0, 9.0)] == [
        None, None, "about 3 minutes left, at the speed so far", None,
    ]  # fmt: skip
    short = TimeLeft(1)
    assert [short.after_step(1.0, 10, 290) for _ in range(3)] == [None, None, None]
    at_once = TimeLeft(1, warm_up=0)
    assert [at_once.after_step(40.0, 1, left) for left in (2, 1)] == [
        "about 80 seconds left, at the speed so far",
        None,
    ]
    durations = {40: "40 seconds", 100: "2 minutes", 720: "12 minutes", 12600: "3.5 hours", 200000: "2.3 days"}
    assert {seconds: duration_text(seconds) for seconds in durations} == durations


def test_the_tokens_left_are_those_of_the_remaining_steps(tmp_path):
    stages = run_config(tmp_path).stages
    each = [stage.global_batch_size * stage.sequence_length for stage in stages for _ in range(stage.steps)]
    assert [tokens_left(step, stages) for step in range(len(each) + 1)] == [sum(each[n:]) for n in range(len(each) + 1)]


def test_accumulation_over_microbatches_changes_nothing(tmp_path, without_figures):
    config = run_config(tmp_path, balance_weight=0.0)
    config = replace(config, stages=tuple(replace(stage, steps=3) for stage in config.stages))
    losses = []
    for size in (4, 1):
        folder = tmp_path / f"run{size}"
        pretrain(replace(config, run_folder=str(folder), micro_batch_size=size))
        losses.append([row["loss/main"] for row in read_metrics(folder / "metrics.jsonl") if "loss/main" in row])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_model_without_gradients_has_none_to_clip():
    """Covers a part of a step that has no sample to learn from."""
    assert clip_gradients(tiny_model(), 1.0) == GradientReport(norm=0.0, num_zeros=0, apart_norm=0.0)


@pytest.mark.parametrize(
    ("model", "mtp_heads"), [("bytes_fairy", None), pytest.param("tiny_fairy", 2, marks=pytest.mark.slow)]
)
def test_quantization_is_one_setting_and_its_result_is_packed_later(
    tmp_path, without_figures, monkeypatch, model, mtp_heads
):
    """The held-out loss of the run is that of the packed model, and each phase has its own weight decay."""
    config = run_config(tmp_path, model=model, quantization="fairy")
    first, second = config.stages
    first = replace(first, steps=2, decay="linear")
    second = replace(second, steps=1, weight_decay=0.0, mtp_heads=mtp_heads)
    decays, step = [], Trainer.train_step

    def recorded(trainer, *arguments):
        report = step(trainer, *arguments)
        decays.append([group["weight_decay"] for group in trainer.optimizer.param_groups])
        return report

    monkeypatch.setattr(Trainer, "train_step", recorded)
    folder = pretrain(replace(config, stages=(first, second)))
    assert decays == [[0.1, 0.0], [0.1, 0.0], [0.0, 0.0]]
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    reported = [row["validation/main"] for row in metrics if "validation/main" in row][-1]
    losses = {}
    for weights in ("plain", "fairy"):
        loader = Loader(second.mixture, Tokenizer.load(folder), sequence_length=64, seed=config.seed, stage=1)
        batches = loader.fixed_batches(2, 1)
        losses[weights] = evaluate(load_model(folder, weights=weights), batches, 64).losses[0]
    assert losses["fairy"] == pytest.approx(reported, abs=2e-3)
    assert abs(losses["plain"] - reported) > 5e-3


def test_quantization_that_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="complex weights"):
        pretrain(run_config(tmp_path, quantization="fairy"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="real weights"):
        pretrain(run_config(tmp_path, quantization="fairy2i", model="tiny_fairy"))
    with pytest.raises(ConfigError, match="quantization_stages"):
        run_config(tmp_path, quantization_stages=2)
