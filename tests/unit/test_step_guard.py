"""The guard before the optimizer: non-finite values stop a step and its checkpoint, and all processes decide alike."""

import json
import traceback
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from test_training import run_config, weights
from torch.utils._python_dispatch import TorchDispatchMode

from openmimo.core.errors import ConfigError, DivergedError
from openmimo.core.metrics import read_metrics
from openmimo.model.hf import load_model, save_model
from openmimo.train import trainer as trainer_module
from openmimo.train.checkpoint import find_damage
from openmimo.train.config import CheckpointConfig, OptimizerConfig
from openmimo.train.loss import training_loss
from openmimo.train.optim import StepGuard, build_optimizer, clip_gradients, step_unless
from openmimo.train.pretrain import pretrain
from openmimo.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_figures")


def one_stage(folder, *, steps=4, every_steps=1, **changes):
    config = run_config(folder)
    stage = replace(config.stages[0], steps=steps, **changes)
    return replace(config, stages=(stage,), checkpoints=CheckpointConfig(every_steps=every_steps, keep_last=2))


def spoil(monkeypatch, *, steps: tuple[int, ...]) -> None:
    """Makes the loss of these steps NaN, as a bad batch would."""
    real = Trainer._accumulate

    def accumulate(trainer, stage, micro_batches):
        losses, load, tokens = real(trainer, stage, micro_batches)
        if trainer.step + 1 in steps:
            trainer.model.get_parameter("model.layers.2.self_attn.q_proj.weight").grad[0, 0] = float("nan")
            losses = losses * float("nan")
        return losses, load, tokens

    monkeypatch.setattr(Trainer, "_accumulate", accumulate)


def test_a_bad_step_ends_the_run_and_good_checkpoints_stay(tmp_path, monkeypatch):
    spoil(monkeypatch, steps=(3,))
    config = one_stage(tmp_path)
    with pytest.raises(DivergedError) as caught:
        pretrain(config)
    message = str(caught.value)
    assert "step 3" in message
    assert "stage 'short'" in message
    assert "rows 8 to 11" in message
    assert "model.layers.2.self_attn.q_proj.weight" in message
    assert "step-00000002, is intact" in message
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]
    assert not (tmp_path / "run" / "model").exists()


def test_an_exploding_learning_rate_writes_no_checkpoint(tmp_path):
    """The weights stay finite for one step; the next loss shows the fault."""
    config = one_stage(tmp_path, learning_rate=1e30, end_learning_rate=1e30)
    with pytest.raises(DivergedError, match="no checkpoint yet"):
        pretrain(config)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_skipped_steps_are_counted_and_change_nothing(tmp_path, monkeypatch):
    config = one_stage(tmp_path, steps=3)
    spoil(monkeypatch, steps=(3,))
    skipping = replace(config, optimizer=OptimizerConfig(max_skipped_steps=1), run_folder=str(tmp_path / "skips"))
    pretrain(skipping)
    rows = read_metrics(tmp_path / "skips" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [0, 0, 1]
    second = weights(tmp_path / "skips" / "checkpoints" / "step-00000002")
    last = weights(tmp_path / "skips" / "model")
    assert all(torch.equal(tensor, last[name]) for name, tensor in second.items())


def test_more_than_the_allowed_skips_end_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, steps=(2, 3))
    config = replace(one_stage(tmp_path), optimizer=OptimizerConfig(max_skipped_steps=1))
    with pytest.raises(DivergedError, match="step 3"):
        pretrain(config)


@pytest.mark.parametrize("bad", [(), (2,), (1, 2), (3,)], ids=str)
def test_a_decision_that_stays_on_the_device_is_the_same(bad):
    """Weights, moments and counts after steps of which some are bad, read one step later."""

    def train(*, deferred: bool) -> tuple[list[torch.Tensor], int, int]:
        model = tiny_model()
        optimizer = build_optimizer(model, OptimizerConfig())
        optimizer.param_groups[0]["lr"] = 1e-2
        guard = StepGuard(model, max_skipped_steps=2)
        for step in (1, 2, 3):
            for parameter in model.parameters():
                values = torch.cos(torch.arange(parameter.numel()) * step)
                parameter.grad = values.view_as(parameter) * (float("nan") if step in bad else 1.0)
            gradients = clip_gradients(model, 1.0)
            if deferred:
                guard.settle()
                step_unless(optimizer, guard.defer(gradients.norm, gradients, f"step {step}"))
            elif guard.allows_step(gradients.norm, gradients, f"step {step}"):
                optimizer.step()
        assert guard.settle() is (3 not in bad if deferred else None)
        states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
        return [*model.parameters(), *states], guard.num_skipped, guard.skipped_in_a_row

    (ours, *counts), (theirs, *expected) = train(deferred=True), train(deferred=False)
    assert counts == expected
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_too_many_bad_steps_are_reported_by_the_next():
    model = tiny_model()
    guard, gradients = StepGuard(model), clip_gradients(model, 1.0)
    assert guard.defer(torch.tensor([float("inf")]), gradients, "step 7 (rows 3)").item() == 1
    with pytest.raises(DivergedError, match=r"step 7 \(rows 3\) has a loss of inf"):
        guard.settle()


WAITS = ("_local_scalar_dense", "aten.nonzero.default", "masked_select", "unique", "aten.equal")
LOOP = ("openmimo/kernels/experts/sorted_loop.py", "run")
ALLOWED = {
    LOOP,  # accelerators have other backends
    ("openmimo/kernels/attention/blocked.py", "_plan"),  # reads lengths, which are on the host
    ("openmimo/model/heads.py", "micro_batch"),  # reads labels before they are copied to the device
    ("openmimo/train/optim.py", "settle"),  # reads the decision of the step before
}


class Waits(TorchDispatchMode):
    """Collects the file and function of each operation that would wait for a device."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = set()
        for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, self._recorded(getattr(torch.Tensor, name)))

    def _recorded(self, method):
        def call(*args, **kwargs):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is self:
                self._add()
            return method(*args, **kwargs)

        return call

    def _add(self):
        frames = [frame for frame in traceback.extract_stack() if "/openmimo/" in frame.filename]
        frame = next(frame for frame in reversed(frames) if "site-packages" not in frame.filename)
        self.found.add(("openmimo/" + frame.filename.rpartition("/openmimo/")[2], frame.name))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        indices = args[1] if name.startswith("aten.index") and isinstance(args[1], (list, tuple)) else ()
        has_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        if has_mask or any(word in name for word in WAITS):
            self._add()
        return function(*args, **(kwargs or {}))


def run_ahead(monkeypatch):
    """Makes trainers queue steps as on an accelerator."""
    monkeypatch.setattr(trainer_module, "works_ahead", lambda device: True)
    monkeypatch.setattr(trainer_module, "QUEUES_STEPS", True)


def test_a_step_on_an_accelerator_waits_for_nothing(tmp_path, monkeypatch):
    run_ahead(monkeypatch)
    waits, real = Waits(monkeypatch), Trainer.train_step

    def watched(trainer, *args):
        with waits:
            return real(trainer, *args)

    monkeypatch.setattr(Trainer, "train_step", watched)
    config = one_stage(tmp_path, steps=2, every_steps=2, mtp_heads=2)
    pretrain(replace(config, log_every_steps=2, micro_batch_size=2, balance_weight=1e-3))
    assert waits.found - ALLOWED == set()
    assert LOOP in waits.found


@pytest.mark.slow
def test_a_run_that_queues_its_steps_is_the_same(tmp_path, monkeypatch):
    spoil(monkeypatch, steps=(3,))
    config = replace(run_config(tmp_path), log_every_steps=4, optimizer=OptimizerConfig(max_skipped_steps=1))
    pretrain(config)
    run_ahead(monkeypatch)
    pretrain(replace(config, run_folder=str(tmp_path / "ahead")))
    ours, theirs = (weights(tmp_path / folder / "model") for folder in ("ahead", "run"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    rows, expected = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("ahead", "run"))
    expected = [row for row in expected if row["step"] != 3]  # on the host, a skipped step is always written
    timed = {"tokens_per_second", "matmul_utilization", "memory_bytes", "time"}
    for one, other in zip(rows, expected, strict=True):
        assert {key: value for key, value in one.items() if key not in timed} == {
            key: value for key, value in other.items() if key not in timed
        }


def test_a_model_that_is_not_finite_is_named_before_it_is_trained(tmp_path):
    config = one_stage(tmp_path, steps=1)
    model_folder = pretrain(replace(config, run_folder=str(tmp_path / "first")))
    model = load_model(model_folder)
    model.model.layers[3].self_attn.o_proj.weight.data[0, 0] = float("inf")
    save_model(model, model_folder)
    with pytest.raises(DivergedError, match=r"model.layers.3.self_attn.o_proj.weight is not finite"):
        pretrain(replace(config, init_from=str(model_folder), tokenizer=type(config.tokenizer)()))


def test_every_process_takes_the_same_branch():
    """Two processes, of which the second has a NaN and no sample of its own."""
    counts = []

    def verdict(loss: float, has_data: bool, others: list[torch.Tensor]) -> bool:
        def reduce(own):
            counts.append(own)
            return sum(others, own)

        model = tiny_model()
        guard = StepGuard(model, max_skipped_steps=1, reduce=reduce)
        return guard.allows_step(torch.tensor([loss]), clip_gradients(model, 1.0), "step 1", has_data=has_data)

    assert verdict(1.0, True, []) is True
    good = counts[-1]
    assert verdict(1.0, False, []) is False
    assert verdict(1.0, False, [good]) is True
    assert verdict(float("nan"), False, [good]) is False
    bad = counts[-1]
    assert verdict(1.0, True, [bad]) is False


def test_gradients_that_are_not_finite_are_not_spread_by_clipping():
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    bad = model.get_parameter("model.norm.weight")
    bad.grad[0] = float("inf")
    assert not torch.isfinite(clip_gradients(model, 1.0).norm)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter is not bad)


def test_a_manifest_that_lists_nothing_is_damage(tmp_path):
    pretrain(one_stage(tmp_path, steps=1))
    newest = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert find_damage(newest) is None
    for content in ("[]", "{}", '{"config.json": "0"}', "\0", "[" * 100_000):
        (newest / "trainer" / "manifest.json").write_text(content)
        assert find_damage(newest) is not None


def test_the_optimizer_state_is_written_without_a_copy(tmp_path):
    from openmimo.train.checkpoint import optimizer_state
    from openmimo.train.optim import build_optimizer

    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    own = {tensor.data_ptr() for state in optimizer.state.values() for tensor in state.values()}
    assert {tensor.data_ptr() for tensor in optimizer_state(model, optimizer).values()} == own


def test_the_balance_loss_is_of_training_rows():
    """DeepSeek-V3's sequence is a training row: document boundaries change nothing, and rows have equal weights."""
    from openmimo.model.context import PackedContext, RoutingTape
    from openmimo.model.heads import micro_batch

    tokens = torch.arange(64) % 160

    def router_gradient(lengths, balance_weight):
        model = tiny_model().train()
        model.zero_grad()
        context = PackedContext(
            lengths, routing=RoutingTape(record=True), balance_weight=balance_weight, balance_length=32
        )
        batch = micro_batch(tokens, lengths, None, 0)
        loss, _ = training_loss(model, batch, context, label_counts=batch.label_counts(), mtp_weight=0.0)
        loss.backward()
        return context.router_loss

    balance = router_gradient((3, 29, 32), 1.0)
    assert balance.num_sequences == 2
    assert balance.sequence_T.tolist() == [0] * 32 + [1] * 32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"end_learning_rate": 2e-3}, "end_learning_rate"),
        ({"warmup_steps": -3}, "warmup_steps"),
        ({"mtp_weight": -1.0}, "mtp_weight"),
        ({"bias_rate": float("nan")}, "bias_rate"),
        ({"full_rope_theta": -5.0}, "full_rope_theta"),
        ({"full_rope_theta": 0.0}, "full_rope_theta"),
        ({"initial_batch_size": 9, "batch_warmup_steps": 2}, "initial_batch_size"),
        ({"batch_multiple": 3}, "batch_multiple"),
        ({"steps": 1.5}, "steps"),
    ],
)
def test_a_stage_out_of_range_is_refused(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        replace(run_config(tmp_path).stages[0], **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"max_skipped_steps": -1}, "max_skipped_steps"),
    ],
)
def test_an_optimizer_out_of_range_is_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        OptimizerConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"threads": -1}, "threads"),
        ({"threads": 100_000}, "threads"),
        ({"run_folder": ""}, "run_folder"),
        ({"balance_weight": float("nan")}, "balance_weight"),
        ({"init_from": "somewhere", "model": "deep"}, "model"),
        ({"init_from": "somewhere"}, "train_megabytes"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_run_out_of_range_is_refused(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        replace(run_config(tmp_path), **changes)


def test_a_checkpoint_policy_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="keep_every"):
        CheckpointConfig(keep_every=-3)
