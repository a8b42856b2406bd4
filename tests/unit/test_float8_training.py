"""Runs with `fp8`: which products it changes, their gradients, recomputation, checkpoints, the guard, and refusals."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_model
from test_training import run_config

from openmimo.core.errors import ConfigError, DivergedError
from openmimo.core.metrics import read_metrics
from openmimo.data.loader import Loader
from openmimo.data.tokenizer import Tokenizer
from openmimo.kernels.weights import Float8Latent
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.context import PackedContext
from openmimo.model.heads import micro_batch
from openmimo.model.hf import load_model
from openmimo.model.presets import medium
from openmimo.model.weight_formats import QuantizableModule, train_float8
from openmimo.parallel.plan import MeshSizes, kept_parameters
from openmimo.train.config import ParallelConfig, TokenizerConfig
from openmimo.train.loss import evaluate, training_loss
from openmimo.train.optim import StepGuard, clip_gradients
from openmimo.train.pretrain import pretrain


def trained_model(seed=0):
    model = randomize(tiny_model(mtp_heads=1), seed)
    train_float8(model)
    return model


def loss_and_gradients(model):
    tokens = torch.randint(0, model.config.vocab_size, (48,), generator=torch.Generator().manual_seed(1))
    batch = micro_batch(tokens, (30, 18), None, model.config.num_mtp_heads)
    context = PackedContext(batch.document_lengths, device=torch.device("cpu"))
    loss, _ = training_loss(model, batch, context, label_counts=batch.label_counts(), mtp_weight=0.3)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_fp8_covers_what_the_published_checkpoint_stores_as_fp8():
    model = trained_model()
    covered = {
        f"{owner}.{name}".split("layers.")[1].partition(".")[2]
        for owner, module in model.named_modules()
        if isinstance(module, QuantizableModule)
        for name in module.quantizable
        if isinstance(module.weight_as(name, torch.float32), Float8Latent)
    }
    projections = {f"self_attn.{part}_proj.weight" for part in "qkv"}
    dense = {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert covered == projections | dense | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_loss_and_gradients_are_those_of_float32_within_the_error_of_fp8():
    loss, gradients = loss_and_gradients(trained_model())
    exact_loss, exact = loss_and_gradients(randomize(tiny_model(mtp_heads=1), 0))
    assert loss != exact_loss
    assert loss == pytest.approx(exact_loss, rel=0.02)
    ours, theirs = (
        torch.cat([gradient.flatten() for gradient in found.values() if gradient is not None])
        for found in (gradients, exact)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9
    assert ours.norm() == pytest.approx(theirs.norm().item(), rel=0.1)


@pytest.mark.slow
def test_recomputed_layers_have_the_same_bits():
    model, recomputing = trained_model(), trained_model()
    checkpoint_activations(recomputing.model)
    loss, gradients = loss_and_gradients(model)
    again, recomputed = loss_and_gradients(recomputing)
    assert loss == again
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients if gradients[name] is not None)


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_a_weight_that_is_not_finite_reaches_the_guard(name):
    model = trained_model().train()
    with torch.no_grad():
        getattr(model.model.layers[0].mlp, name).weight[3, 5] = float("inf")
    loss, _ = loss_and_gradients(model)
    guard = StepGuard(model, max_skipped_steps=0)
    with pytest.raises(DivergedError, match="not finite"):
        guard.allows_step(torch.tensor([loss]), clip_gradients(model, 1.0), "step 1")


@pytest.mark.parametrize(
    ("model", "mtp_heads"), [("bytes_real", None), pytest.param("tiny", 2, marks=pytest.mark.slow)]
)
def test_a_run_is_one_setting_and_its_model_is_plain(tmp_path, without_figures, model, mtp_heads):
    """The held-out loss of the run is that of the saved model in the same arithmetic. New MTP heads compute in FP8."""
    config = run_config(tmp_path, fp8=True, model=model)
    second = replace(config.stages[1], steps=1, mtp_heads=mtp_heads)
    folder = pretrain(replace(config, stages=(second,), tokenizer=TokenizerConfig(path="openmimo/assets/tiny-mimo")))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    reported = [row["validation/main"] for row in rows if "validation/main" in row][-1]
    losses = {}
    for is_float8 in (False, True):
        trained = load_model(folder)
        if is_float8:
            train_float8(trained)
        loader = Loader(second.mixture, Tokenizer.load(folder), sequence_length=64, seed=config.seed, stage=0)
        losses[is_float8] = evaluate(trained, loader.fixed_batches(2, 1), 64).losses[0]
    assert losses[True] == reported
    assert losses[False] != reported
    assert losses[False] == pytest.approx(reported, rel=0.02)


def test_what_fp8_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="fp8 and quantization 'ternary'"):
        run_config(tmp_path, fp8=True, quantization="ternary")
    config = run_config(tmp_path, fp8=True)
    with pytest.raises(ConfigError, match="float64"):
        replace(config, dtype="float64")
    with pytest.raises(ConfigError, match="parallel.tp 2"):
        replace(config, parallel=ParallelConfig(tp=2))
    with pytest.raises(ConfigError, match="complex layers"):
        pretrain(replace(config, model="tiny_fairy"))
    assert not (tmp_path / "run").exists()


def test_medium_has_the_stated_size_and_whole_blocks():
    config = medium()
    assert kept_parameters(config, MeshSizes()) == pytest.approx(1.28e9, rel=0.005)
    attention = [layer.attention for layer in config.layers]
    rows = [count for spec in attention for count in (spec.num_heads * spec.key_dim, spec.num_kv_heads * spec.key_dim)]
    rows += [spec.num_kv_heads * spec.value_dim for spec in attention]
    assert all(count % 128 == 0 for count in (*rows, config.hidden_size, config.dense_ffn_dim, config.moe.expert_dim))
