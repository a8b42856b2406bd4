"""What a step keeps for its backward pass never changes its gradients, and each option keeps what it promises."""

import copy
import gc

import pytest
import torch
from conftest import tiny_config

from openmimo.core.errors import ConfigError
from openmimo.model import activations
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.config import ActivationConfig
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.heads import micro_batch
from openmimo.model.mimo import MiMo
from openmimo.model.presets import model_config
from openmimo.train.config import RunConfig
from openmimo.train.loss import training_loss
from openmimo.train.outcome import use_device

LENGTHS = (40, 23)
EXACT = [
    {"recompute": "layers"}, {"recompute": "but_attention"}, {"recompute": "attention"}, {"recompute": "ffn"},
    {"recompute": "but_attention", "recompute_every": 2}, {"recompute": "layers", "offload": True},
    {"recompute": "but_attention", "offload": True},
]  # fmt: skip


OTHERS = ("tiny_hysparse", "tiny_fairy")


def model_of(preset: str | None = None) -> MiMo:
    model = MiMo(tiny_config(mtp_heads=2) if preset is None else model_config(preset))
    model.initialize(torch.Generator().manual_seed(0))
    return model.train()


def gradients_of(model: MiMo) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens_T = torch.randint(0, 160, (sum(LENGTHS),), generator=generator)
    context = PackedContext(LENGTHS, routing=RoutingTape(record=True), balance_weight=0.01, z_weight=0.01)
    batch = micro_batch(tokens_T, LENGTHS, None, model.config.num_mtp_heads)
    loss, _ = training_loss(model, batch, context, label_counts=batch.label_counts(), mtp_weight=0.3)
    loss.backward()
    assert set(context.routing.recorded) == set(model.routers())
    return {"loss": loss.detach()} | {name: own.grad for name, own in model.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("preset", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_gradients_are_those_of_a_step_that_keeps_everything(preset, monkeypatch):
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", 64)
    plain = gradients_of(model_of(preset))
    for settings in EXACT if preset is None else EXACT[:2]:
        model = model_of(preset)
        checkpoint_activations(model.model, ActivationConfig(**settings))
        found = gradients_of(model)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain), settings


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_chunks_add_up_in_another_order_only(recompute):
    plain = gradients_of(model_of())
    model = model_of()
    checkpoint_activations(model.model, ActivationConfig(ffn_chunks=5), recompute=recompute)
    for name, gradient in gradients_of(model).items():
        assert (gradient - plain[name]).abs().max() <= 1e-6 * plain[name].abs().max() + 1e-9, name


def test_attention_runs_once_where_its_results_are_kept(monkeypatch):
    calls = []
    attend = PackedContext.attend
    monkeypatch.setattr(PackedContext, "attend", lambda own, call: (calls.append(call.layer), attend(own, call))[1])
    model = model_of()
    layers = len(model.model.layers) + 2
    for what, count in (("but_attention", layers), ("ffn", layers), ("layers", 2 * layers), ("attention", 2 * layers)):
        model = model_of()
        checkpoint_activations(model.model, ActivationConfig(recompute=what))
        calls.clear()
        gradients_of(model)
        assert len(calls) == count, what


def test_settings_stay_with_a_copy_and_reach_new_heads_only_once():
    model = model_of()
    checkpoint_activations(model.model, ActivationConfig(ffn_chunks=2))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[1].mlp.experts.down_proj.zero_()
    plain, changed = gradients_of(model), gradients_of(twin)
    assert plain["loss"] != changed["loss"], "the copy computes with its own weights"
    model.replicate_mtp_heads(3)
    before = dict(vars(model.model.layers[0].mlp))
    checkpoint_activations(model.model, ActivationConfig(ffn_chunks=2))
    assert vars(model.model.layers[0].mlp)["forward"] is before["forward"]
    assert "forward" in vars(model.model.mtp.layers[2].mlp)
    assert list(model.state_dict()) == list(MiMo(model.config).state_dict())


def test_offloaded_tensors_are_copied_once_and_dropped(monkeypatch):
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", 64)
    model = model_of()
    checkpoint_activations(model.model, ActivationConfig(offload=True), recompute=False)
    moved = []
    offload = activations.OffloadStream.offload
    monkeypatch.setattr(
        activations.OffloadStream,
        "offload",
        lambda own, tensor: (moved.append((tensor.data_ptr(), tensor.shape)), offload(own, tensor))[1],
    )
    gradients_of(model)
    assert len(moved) > 8 * len(model.model.layers)
    gc.collect()
    assert not [found for found in gc.get_objects() if isinstance(found, activations.OffloadedTensor)]


@pytest.mark.parametrize(
    ("settings", "checkpointing", "message"),
    [
        ({"recompute": "ffn"}, False, "no effect without activation_checkpointing"),
        ({"recompute_every": 2}, False, "no effect without activation_checkpointing"),
        ({"recompute": "ffn", "ffn_chunks": 2}, True, "ffn_chunks recomputes"),
        ({"recompute_every": 0}, True, "at least 1"),
    ],
)
def test_settings_without_effect_are_refused(settings, checkpointing, message):
    with pytest.raises(ConfigError, match=message):
        ActivationConfig(**settings).check(checkpointing=checkpointing)


def test_offloading_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="activations.offload has no effect on device 'cpu'"):
        use_device(RunConfig("run", device="cpu", activations=ActivationConfig(offload=True)))


def test_layers_that_keep_all_stay_so_when_the_settings_are_applied_again():
    model = model_of()
    for _ in range(2):
        checkpoint_activations(model.model, ActivationConfig(recompute_every=2))
    wrapped = ["forward" in vars(layer) for layer in (*model.model.layers, *model.model.mtp.layers)]
    assert wrapped == [True, False, True, False, True, False, True]
