"""HySparse: selection by block scores, the two branches, the future, packs, the cache, and checkpoints.

Training, generation and reused prefixes of sparse layers are in `test_shared_keys.py`; block scores and reading of
chosen blocks by every backend are in `tests/contracts`.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomize
from transformers import AutoConfig

from openmimo.core.errors import ConfigError
from openmimo.core.records import SamplingParams
from openmimo.engine.cache import PageArena, PageTables, all_global_cache_bytes
from openmimo.engine.llm import LLM
from openmimo.kernels.attention import attend
from openmimo.kernels.operations import apply_rotary
from openmimo.model.audit import audit
from openmimo.model.config import ModelConfig, active_matmul_parameters, attention_flops_per_token
from openmimo.model.context import AttentionCall, PackedContext
from openmimo.model.convert import ConvertConfig, convert
from openmimo.model.hf import load_model, save_model
from openmimo.model.hf_config import config_from_hf, config_to_hf
from openmimo.model.mimo import MiMo
from openmimo.model.presets import PRESETS, hysparse_7b, hysparse_80b, hysparse_layers, tiny_hysparse
from openmimo.model.sparse_attention import SparseAttention, choose_blocks


def model_of(config: ModelConfig) -> MiMo:
    return randomize(MiMo(config), 1).double()


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(seed))


def block_maxima(numbers_THS: np.ndarray, block: int) -> np.ndarray:
    T, H, S = numbers_THS.shape
    padded = np.full((T, H, -(-S // block) * block), -np.inf)
    padded[..., :S] = numbers_THS
    return padded.reshape(T, H, -1, block).max(-1)


def test_blocks_are_chosen_by_probabilities_and_not_by_line_16_of_the_paper():
    """Heads of different scale: maxima of probabilities (equation 3) rank blocks otherwise than maxima of logits."""
    T, H, K, block, count = 160, 4, 16, 16, 4
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(T, n, K, generator=generator, dtype=torch.float64) for n in (H, 1, 1))
    q *= torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)[:, None]
    scores = attend(q, k, v, None, query_lengths=(T,), key_lengths=(T,), window_keys=None, score_block=block)[1]
    chosen = choose_blocks(scores, torch.arange(T), size=block, count=count).ids_TGJ[:, 0]

    logits = np.einsum("thk,sk->ths", q.numpy(), k[:, 0].numpy()) / K**0.5
    logits = np.where(np.arange(T)[:, None, None] < np.arange(T), -np.inf, logits)
    largest = logits.max(-1, keepdims=True)
    total = np.exp(logits - largest).sum(-1, keepdims=True)
    by_equation_3 = block_maxima(np.exp(logits - largest) / total, block).max(1)
    by_line_16 = block_maxima((logits - largest) / total, block).max(1)
    assert np.abs(scores[:, 0].numpy() - by_equation_3).max() < 1e-12
    late = [t for t in range(T) if t // block >= count]
    agree = {
        name: np.mean([set(np.argsort(-numbers[t])[:count]) == set(chosen[t].tolist()) for t in late])
        for name, numbers in (("equation 3", by_equation_3), ("line 16", by_line_16))
    }
    assert agree["equation 3"] == 1.0
    assert agree["line 16"] < 0.9


def test_the_highest_scores_are_chosen_and_all_blocks_where_there_are_too_few():
    scores = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.1, 0.4, 0.4, 0.0], [0.2, 0.3, 0.1, 0.3], [0.0, 0.0, 0.0, 0.0]])
    chosen = choose_blocks(scores[:, None], torch.tensor([2, 9, 15, 15]), size=4, count=2)
    assert chosen.ids_TGJ[:, 0].tolist() == [[0, -1], [1, 2], [1, 3], [0, 1]]  # of equal scores, the earlier block
    few = choose_blocks(scores[:2, None, :2], torch.tensor([2, 7]), size=4, count=9)
    assert few.ids_TGJ[:, 0].tolist() == [[0, -1], [0, 1]]


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_all_blocks_with_open_and_closed_gates_are_dense_attention_to_the_shared_keys(gate, monkeypatch):
    config = tiny_hysparse()
    full = config.layers[0].attention
    config = replace(
        config,
        layers=hysparse_layers(
            2, full_layers=(0,), full=full, block=16, selected_keys=512, window_keys=16, gate=gate, sink=False
        ),
    )
    layer = model_of(config).model.layers[1].self_attn
    context, x = PackedContext((90,)), torch.randn(90, 128, dtype=torch.float64)
    q, k, v = (torch.randn(90, heads, dim, dtype=torch.float64) for heads, dim in ((4, 48), (2, 48), (2, 32)))
    context.attend(AttentionCall(0, q, k, v, None, None, is_source=True, score_block=16))
    assert isinstance(layer, SparseAttention)
    monkeypatch.setattr(layer, "o_proj", torch.nn.Identity())
    sparse, window = (torch.full_like(gate.weight, 0.0) for gate in (layer.sparse_gate_proj, layer.window_gate_proj))
    sparse[:, 0], window[:, 0], x[:, 0] = 1e4, -1e4, 1.0
    layer.sparse_gate_proj.weight.data, layer.window_gate_proj.weight.data = sparse, window
    own = apply_rotary(layer.q_proj(x).view(90, 4, 48), *context.rotary(layer.spec, x.dtype))
    logits = torch.einsum("tnk,snk->nts", own, k.repeat_interleave(2, 1)) * 48**-0.5
    logits += torch.full((90, 90), float("-inf"), dtype=torch.float64).triu(1)
    expected = torch.einsum("nts,snv->tnv", logits.softmax(-1), v.repeat_interleave(2, 1))
    assert torch.allclose(layer(x, context), expected.flatten(1), rtol=1e-10, atol=1e-12)


def states_and_choices(model: MiMo, ids: torch.Tensor, *lengths: int):
    context = PackedContext(lengths or (len(ids),))
    with torch.no_grad():
        states = model(ids, context).post_norm_TD
    return states, context.chosen_blocks[0, 64].ids_TGJ


def test_later_tokens_change_neither_states_nor_chosen_blocks():
    model, ids = model_of(tiny_hysparse()), ids_of(150)
    states, chosen = states_and_choices(model, ids)
    changed = ids.clone()
    changed[111:] = ids_of(39, 7)
    other_states, other_chosen = states_and_choices(model, changed)
    assert torch.allclose(states[:111], other_states[:111], rtol=1e-12, atol=1e-12)
    assert torch.equal(chosen[:111], other_chosen[:111])
    assert not torch.equal(chosen[111:], other_chosen[111:])
    shorter_states, shorter_chosen = states_and_choices(model, ids[:111])
    assert torch.allclose(states[:111], shorter_states, rtol=1e-12, atol=1e-12)
    assert torch.equal(chosen[:111], shorter_chosen)


def test_documents_of_a_pack_have_their_own_blocks():
    model, first, second = model_of(tiny_hysparse()), ids_of(93), ids_of(120, 1)
    states, chosen = states_and_choices(model, torch.cat([first, second]), 93, 120)
    for rows, ids in ((slice(0, 93), first), (slice(93, 213), second)):
        alone, chosen_alone = states_and_choices(model, ids)
        assert torch.allclose(states[rows], alone, rtol=1e-12, atol=1e-12)
        assert torch.equal(chosen[rows], chosen_alone)


@pytest.mark.parametrize("block", [16, 1], ids=["blocks", "tokens"])
@torch.inference_mode()
def test_c_kernels_decode_what_one_pass_computes(block):
    """Prompts in chunks, drafts and decoding in float32, where the C kernels run, against one pass without a cache."""
    config = tiny_hysparse()
    layers = [
        replace(x, attention=replace(x.attention, score_block=x.attention.score_block and block)) for x in config.layers
    ]
    model = randomize(MiMo(replace(config, layers=tuple(layers))), 1)
    prompts = [ids_of(length, length).tolist() for length in (3, 170)]
    params = SamplingParams(max_tokens=40, temperature=0.0, logprobs=True, ignore_eos=True)
    for prompt, completion in zip(prompts, LLM(model, prefill_tokens=64).generate(prompts, params), strict=True):
        tokens = torch.tensor(prompt + list(completion.token_ids))
        logprobs = model.logits(tokens)[len(prompt) - 1 : -1].log_softmax(-1)
        assert list(completion.token_ids) == logprobs.argmax(-1).tolist()
        assert torch.allclose(torch.tensor(completion.logprobs), logprobs.max(-1).values, atol=1e-4)


def formula(config: ModelConfig, length: int, number_bytes: int) -> int:
    """Keys and values of all positions in full layers, and of the window before the next query in sparse layers."""
    total = 0
    for layer in config.layers:
        spec = layer.attention
        kept = length if spec.window_keys is None else min(length, spec.window_keys - 1)
        total += kept * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * number_bytes
    return total


@pytest.mark.parametrize("preset", [tiny_hysparse, hysparse_7b, hysparse_80b])
def test_the_cache_holds_the_bytes_of_the_formula(preset):
    config = preset()
    layers = tuple(layer.attention for layer in config.layers)
    budget = 1 << (22 if preset is tiny_hysparse else 33)
    arena = PageArena(layers, cache_bytes=budget, dtype=torch.bfloat16, page_positions=16, device="meta")
    for length in (1, 15, 16, 100, 1000):
        assert arena.ideal_bytes(length) == formula(config, length, 2)
        tables = PageTables(arena, 0)
        tables.reach(length)
        tables.leave_behind(length)
        pages = sum(group.num_parts for group in arena.layout.groups)
        assert formula(config, length, 2) <= tables.num_pages * arena.page_bytes
        # rounding: less than a page at either end of the positions of each part, and padding of at most a tenth
        assert tables.num_pages <= (formula(config, length, 2) / arena.page_bytes + 2 * pages) * 1.1
        tables.release()


@pytest.mark.parametrize(
    ("preset", "length", "ratio"),
    [(hysparse_80b, 8192, 8.62), (hysparse_80b, 32768, 9.47), (hysparse_80b, 131072, 9.72), (hysparse_7b, 32768, 3.56)],
)
def test_the_cache_is_smaller_than_that_of_full_layers_as_computed_from_the_paper(preset, length, ratio):
    layers = tuple(layer.attention for layer in preset().layers)
    full = all_global_cache_bytes(layers, length, torch.bfloat16)
    assert full / formula(preset(), length, 2) == pytest.approx(ratio, abs=0.01)


def test_presets_have_the_published_geometry():
    config = hysparse_80b()
    kinds = [layer.attention.kind for layer in config.layers]
    assert [index for index, kind in enumerate(kinds) if kind == "full"] == [0, 12, 24, 36, 48]
    assert {layer.attention.kv_from for layer in config.layers[1:12]} == {0}
    assert config.layers[48].attention.score_block is None  # nothing reads the scores of the last layer
    assert 3e9 < active_matmul_parameters(config) < 3.5e9
    assert len(hysparse_7b().layers) == 36 and hysparse_7b().layers[35].attention.kind == "full"
    with pytest.raises(ConfigError, match="layer 0 must be full"):
        hysparse_layers(4, full_layers=(1,), full=config.layers[0].attention, block=4, selected_keys=8, window_keys=4)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "parameters"), [(hysparse_7b, 7.6e9), (hysparse_80b, 80e9)])
def test_presets_have_the_published_size(preset, parameters):
    assert audit(preset()).main == pytest.approx(parameters, rel=0.01)


def test_keys_that_are_read_are_counted():
    spec = tiny_hysparse().layers[1].attention
    keys = sum(min(position + 1, 64) + min(position + 1, 16) for position in range(300)) / 300
    assert attention_flops_per_token(spec, 300) == pytest.approx(2 * 4 * (48 + 32) * keys)


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (1, {"kv_from": None}, "is 'sparse' without kv_from"),
        (1, {"window_keys": None, "gate": None}, "is 'sparse' without window_keys, gate"),
        (1, {"score_block": 8}, "has score_block 8, but layer 0, whose block scores it reads, has 16"),
        (1, {"selected_keys": 40}, "has selected_keys 40, which is not a multiple of score_block 16"),
        (1, {"num_kv_heads": 4}, "its num_kv_heads is 4"),
        (0, {"selected_keys": 64}, "'full' with selected_keys 64 and gate None, which only sparse layers have"),
        (2, {"gate": "token"}, "must be one of 'head', 'channel'|gate"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(index, changes, message):
    config = tiny_hysparse()
    with pytest.raises(ConfigError, match=message):
        layers = list(config.layers)
        layers[index] = replace(layers[index], attention=replace(layers[index].attention, **changes))
        replace(config, layers=tuple(layers))


def test_tensor_parallel_ranks_do_not_divide_the_heads():
    assert tiny_hysparse().local(tp=1) == tiny_hysparse()
    with pytest.raises(ConfigError, match="layer 1 is 'sparse', a kind whose heads are not divided"):
        tiny_hysparse().local(tp=2)


def test_a_saved_model_is_the_same_and_transformers_refuses_it(tmp_path):
    model = randomize(MiMo(tiny_hysparse()), 1)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded.logits(ids_of(70)), model.logits(ids_of(70)))
    with pytest.raises(ValueError, match="openmimo"):
        AutoConfig.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "settings", [{"projections": "fused_qkv", "dtype": "float32"}, {"dtype": "fp8"}], ids=["fused_qkv", "fp8"]
)
def test_a_converted_checkpoint_has_all_tensors(settings, tmp_path):
    model = randomize(MiMo(tiny_hysparse()), 1)
    save_model(model, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "other", ConvertConfig(**settings), start=lambda size: lambda done: None)
    loaded, expected = load_model(tmp_path / "other").state_dict(), model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (loaded[name] - tensor).norm() / tensor.norm()
        assert error <= (0.05 if "dtype" in settings and settings["dtype"] == "fp8" else 0.0), name


@pytest.mark.parametrize("name", [name for name in PRESETS if "hysparse" in name])
def test_config_json_states_the_whole_model(name):
    config = PRESETS[name]()
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "layers", 1, "attention", "kind"), "os:system", "kind 'os:system'; the layout 'openmimo' has full"),
        (("model", "layers", 1, "attention", "kind"), ["full"], "kind"),
        (("model", "layers", 1, "attention", "score_block"), 0, "score_block"),
        (("model", "layers", 0), None, "layers"),
        (("model", "surprise"), 1, "surprise"),
        (("model",), None, "model"),
        (("surprise",), 1, "surprise"),
    ],
)
def test_a_damaged_config_json_is_refused(path, value, message):
    values = json.loads(json.dumps(config_to_hf(tiny_hysparse())))
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        config_from_hf(values, where="config.json")
    with pytest.raises(ConfigError, match="window_keys 5"):
        config_from_hf(config_to_hf(tiny_hysparse()), window_keys=5)
