"""Layers that read an earlier layer's keys and block scores, against attention written out in float64.

Besides two kinds of tests, these are the sparse layers of HySparse, whose own window is a second call.

Covers training, chunks, decoding, reused prefixes, preemption, speculation, cache bytes and counts.
"""

from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config

from openmimo.core.errors import ConfigError
from openmimo.core.records import Request, SamplingParams
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.kernels.attention import AttentionOut
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.config import ModelConfig, attention_parameters
from openmimo.model.context import AttentionCall, PackedContext
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.rl.learning.packing import PromptGroup, SharedPromptContext

SHARED, SCORED, BLOCK = "tests.attention_kinds:SHARED", "tests.attention_kinds:SCORED", 8
KINDS = [SHARED, SCORED, "sparse"]
SLOW_SPARSE = pytest.param("sparse", marks=pytest.mark.slow)


def shared_config(kind: str = SHARED, mtp_heads: int = 0) -> ModelConfig:
    """Layers 2 and 3 read the keys of full layer 0; layer 5 reads those of sliding layer 4 in a narrower window."""
    config = tiny_config(num_layers=7, mtp_heads=mtp_heads)
    layers = list(config.layers)
    full = replace(layers[0].attention, score_block=None if kind == SHARED else BLOCK)
    layers[0] = replace(layers[0], attention=full)
    for index in (2, 3):
        shared = replace(full, kind=kind, kv_from=0, sink=True, score_block=None)
        if kind == "sparse":
            gate = "head" if index == 2 else "channel"
            shared = replace(shared, score_block=BLOCK, selected_keys=2 * BLOCK, gate=gate, window_keys=6)
        layers[index] = replace(layers[index], attention=shared)
    narrow = replace(layers[4].attention, kind=SHARED, kv_from=4, window_keys=5)
    layers[5] = replace(layers[5], attention=narrow)
    return replace(config, layers=tuple(layers))


def shared_model(kind: str = SHARED, mtp_heads: int = 0) -> MiMo:
    return randomize(MiMo(shared_config(kind, mtp_heads)), 1).double()


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(seed))


class WrittenOut(PackedContext):
    """Attention computed for one query and one head at a time."""

    def attend(self, call: AttentionCall) -> AttentionOut:
        if call.source_layer is None:
            self._sources[call.layer] = (call.k_TGK, call.v_TGV)
        k_TGK, v_TGV = self._sources[call.layer if call.source_layer is None else call.source_layer]
        T, N, K = call.q_TNK.shape
        G, rows, scores = k_TGK.shape[1], [], torch.zeros(T, k_TGK.shape[1], -(-max(self.document_lengths) // BLOCK))
        for place in range(T):
            start = place - int(self.positions_T[place])
            first = start if call.window_keys is None else max(start, place - call.window_keys + 1)
            for head in range(N):
                group = head // (N // G)
                keys = torch.arange(first, place + 1)
                if call.blocks is not None:
                    keys = keys[torch.isin((keys - start) // BLOCK, call.blocks.ids_TGJ[place, group])]
                logits = k_TGK[keys, group] @ call.q_TNK[place, head] / K**0.5
                if call.sink_N is not None:
                    logits = torch.cat([logits, call.sink_N[head, None]])
                weights = logits.softmax(0)[: len(keys)]
                rows.append(weights @ v_TGV[keys, group])
                for key, weight in zip((keys - start).tolist(), weights.detach(), strict=True):
                    scores[place, group, key // BLOCK] = max(scores[place, group, key // BLOCK], weight)
        self.block_scores[call.layer] = scores.to(call.q_TNK.dtype)
        return AttentionOut(torch.stack(rows).view(T, N, -1))


def loss_and_gradients(model: MiMo, context: PackedContext, tokens_T: torch.Tensor):
    model.zero_grad()
    states_TD = model(tokens_T, context).post_norm_TD
    loss = torch.nn.functional.cross_entropy(model.head(states_TD)[:-1], tokens_T[1:])
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", [SHARED, SCORED, SLOW_SPARSE])
def test_training_is_attention_written_out(kind):
    torch.set_default_dtype(torch.float64)
    try:
        model, tokens_T = shared_model(kind), ids_of(60)
        loss, gradients = loss_and_gradients(model, PackedContext((33, 27)), tokens_T)
        expected, expected_gradients = loss_and_gradients(model, WrittenOut((33, 27)), tokens_T)
    finally:
        torch.set_default_dtype(torch.float32)
    assert abs(loss - expected) < 1e-12
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-8, atol=1e-12), name


def test_a_layer_is_trained_by_those_that_read_its_keys_and_the_loss_falls():
    model, tokens_T = shared_model(), ids_of(60)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()  # its output projection is zero
    first, gradients = loss_and_gradients(model, PackedContext((60,)), tokens_T)
    assert gradients["model.layers.0.self_attn.q_proj.weight"].abs().max() == 0
    for part in ("k_proj", "v_proj"):
        assert gradients[f"model.layers.0.self_attn.{part}.weight"].abs().max() > 1e-6
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(8):
        loss, _ = loss_and_gradients(model, PackedContext((60,)), tokens_T)
        optimizer.step()
    assert loss < 0.8 * first


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_answers_that_share_a_prompt_are_whole_samples(kind):
    model, prompt, answers = shared_model(kind), ids_of(30), [ids_of(11, 1), ids_of(20, 2)]
    context = SharedPromptContext((PromptGroup(30, (11, 20)),))
    together = model(torch.cat([prompt, *answers]), context).post_norm_TD[30:].split((11, 20))
    for states_TD, answer in zip(together, answers, strict=True):
        alone = model(torch.cat([prompt, answer]), PackedContext((30 + len(answer),))).post_norm_TD[30:]
        assert torch.allclose(states_TD, alone, rtol=1e-10, atol=1e-12)


def assert_by_definition(model: MiMo, prompt: list[int], tokens: list[int], logprobs: list[float]) -> None:
    """Greedy tokens and their log-probabilities are those of one pass over the whole text."""
    logprobs_TX = model.logits(torch.tensor(prompt + tokens))[len(prompt) - 1 : -1].log_softmax(-1)
    assert tokens == logprobs_TX.argmax(-1).tolist()
    assert logprobs == pytest.approx(logprobs_TX.max(-1).values.tolist(), abs=1e-10)


@pytest.mark.parametrize(
    ("kind", "mtp_heads"),
    [
        (SHARED, 0),
        (SHARED, 2),
        (SCORED, 0),
        (SCORED, 2),
        pytest.param("sparse", 0, marks=pytest.mark.slow),
        ("sparse", 2),
    ],
)
@torch.inference_mode()
def test_generation_by_definition(kind, mtp_heads):
    """Prompts read whole and in chunks, decoded one by one and with drafts, several sequences in a batch."""
    model = shared_model(kind, mtp_heads)
    prompts = [ids_of(length, length).tolist() for length in (1, 9, 40, 77)]
    params = SamplingParams(max_tokens=20, temperature=0.0, logprobs=True, ignore_eos=True)
    for settings in ({}, {"prefill_tokens": 24}):
        for prompt, completion in zip(prompts, LLM(model, **settings).generate(prompts, params), strict=True):
            assert_by_definition(model, prompt, list(completion.token_ids), list(completion.logprobs))


@pytest.mark.parametrize("mtp_heads", [0, 2])
@pytest.mark.parametrize("kind", [SHARED, SCORED, SLOW_SPARSE])
@torch.inference_mode()
def test_reused_prefixes_by_definition(kind, mtp_heads):
    model, prompt = shared_model(kind, mtp_heads), ids_of(300).tolist()
    longer, engine = prompt + ids_of(37, 1).tolist(), Engine(model)
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=True, ignore_eos=True)
    for name, tokens in (("first", prompt), ("second", longer)):
        sequence = engine.submit(Request(name, tuple(tokens), params))
        while engine.has_work:
            engine.step()
    completion = sequence.completion()
    assert completion.num_cached_tokens >= 200
    assert_by_definition(model, longer, list(completion.token_ids), list(completion.logprobs))


@pytest.mark.parametrize("kind", [SHARED, SLOW_SPARSE])
@torch.inference_mode()
def test_preemption_changes_nothing(kind):
    model = shared_model(kind, mtp_heads=2)
    roomy = Engine(model)
    cache_bytes = (roomy.scheduler.pages_at_most(200) + 4) * roomy.arena.page_bytes
    engine = Engine(model, config=EngineConfig(cache_gigabytes=cache_bytes / 2**30))
    params = SamplingParams(max_tokens=80, temperature=0.0, logprobs=True, ignore_eos=True)
    sequences = [engine.submit(Request(str(n), tuple(ids_of(60, n).tolist()), params)) for n in range(4)]
    while engine.has_work:
        engine.step()
    assert engine.scheduler.num_preemptions > 0
    for n, sequence in enumerate(sequences):
        completion = sequence.completion()
        assert_by_definition(model, ids_of(60, n).tolist(), list(completion.token_ids), list(completion.logprobs))


def test_layers_that_read_others_have_no_bytes_in_the_cache():
    """An arena of the shared model has the layers of one whose model lacks the layers that share keys."""
    model = shared_model(mtp_heads=2)
    owners = {index for index, spec in enumerate(model.config.attention_layers()) if spec.kv_from is None}
    arena = Engine(model).arena
    assert {layer for group in arena.layout.groups for layer in group.layers} == owners
    shorter = replace(
        model.config,
        layers=tuple(layer for layer in model.config.layers if layer.attention.kv_from is None),
    )
    smaller = Engine(MiMo(shorter).double()).arena
    assert arena.page_bytes == smaller.page_bytes
    for length in (3, 20, 500):
        assert arena.ideal_bytes(length) == smaller.ideal_bytes(length)
        assert arena.pages_for(length, 2) == smaller.pages_for(length, 2)
    for reader, source in ((2, 0), (3, 0), (5, 4)):
        assert arena.layer(reader) is arena.layer(source)


@pytest.mark.parametrize(
    ("kind", "index"), [(SHARED, index) for index in (0, 1, 2, 5, 7)] + [("sparse", 2), ("sparse", 3)]
)
def test_parameters_of_an_attention_layer_are_counted(kind, index):
    config = replace(shared_config(kind, mtp_heads=1), attention_bias=True)
    model = MiMo(config)
    layer = model.model.layers[index] if index < 7 else model.model.mtp.layers[0]
    counted = sum(parameter.numel() for parameter in layer.self_attn.parameters())
    assert attention_parameters(config, index) == counted


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (2, {"kv_from": None}, "layer 2 is a shared layer without kv_from"),
        (2, {"kv_from": 2}, "layer 2 has kv_from 2; it must name an earlier layer"),
        (2, {"kv_from": 40}, "layer 2 has kv_from 40; it must name an earlier layer"),
        (3, {"kv_from": 2}, "that layer reads the keys of layer 0"),
        (2, {"num_kv_heads": 4}, "its num_kv_heads is 4 and that of the other 2"),
        (2, {"rope_theta": 1e4}, "its rope_theta is 10000.0 and that of the other 5000000.0"),
        (5, {"window_keys": 10}, "layer 5 has window_keys 10"),
        (1, {"kv_from": 0, "num_kv_heads": 2, "rope_theta": 5e6}, "a sliding layer has its own keys"),
        (6, {"kv_from": 0}, "a full layer has its own keys|must be equal"),
        (1, {"score_block": 8}, "only a layer without a window scores blocks"),
        (1, {"window_keys": None}, "a sliding layer needs a window"),
        (0, {"window_keys": 5}, "a full layer has no window"),
        (2, {"kind": SCORED}, "reads the block scores of layer 0, which has no score_block"),
        (0, {"kind": "flat"}, "has no AttentionKind called 'flat'"),
        (2, {"kind": "tests.attention_kinds:NONE"}, "has no 'NONE'"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(index, changes, message):
    config = shared_config()
    layers = list(config.layers)
    layers[index] = replace(layers[index], attention=replace(layers[index].attention, **changes))
    with pytest.raises(ConfigError, match=message):
        replace(config, layers=tuple(layers))


@pytest.mark.parametrize("kind", [SHARED, SCORED])
def test_a_checkpoint_that_cannot_state_a_kind_is_not_written(kind, tmp_path):
    with pytest.raises(ConfigError, match=f"of kind '({kind}|full)'.*cannot be saved"):
        save_model(shared_model(kind), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", [SHARED, SCORED, SLOW_SPARSE])
def test_recomputed_activations_give_the_same_gradients(kind):
    model, tokens_T = shared_model(kind), ids_of(40)
    loss, gradients = loss_and_gradients(model, PackedContext((25, 15)), tokens_T)
    checkpoint_activations(model.model)
    again, recomputed = loss_and_gradients(model, PackedContext((25, 15)), tokens_T)
    assert loss == again
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


@pytest.mark.parametrize("kind", [SHARED, "sparse"])
def test_context_extension_moves_a_full_layer_and_those_that_read_it(kind):
    model = shared_model(kind)
    model.extend_context(full_rope_theta=1e7, max_positions=1 << 16)
    thetas = [layer.self_attn.spec.rope_theta for layer in model.model.layers]
    assert [index for index, theta in enumerate(thetas) if theta == 1e7] == [0, 2, 3, 6]
