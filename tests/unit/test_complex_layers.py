"""Complex-valued layers against torch's complex numbers, models of them, and quantization-aware training."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config
from torch import nn

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.records import SamplingParams
from openmimo.engine.llm import LLM
from openmimo.kernels.operations import apply_rotary, rotary_table
from openmimo.kernels.weights import Packing
from openmimo.model.attention import AttentionConfig
from openmimo.model.audit import audit
from openmimo.model.complex_layers import (
    ComplexAttention,
    ComplexExperts,
    ComplexFFN,
    ComplexLinear,
    ComplexMerge,
    ComplexNorm,
    gated,
)
from openmimo.model.config import ComplexConfig, MoEConfig, active_matmul_parameters, training_flops_per_token
from openmimo.model.context import PackedContext
from openmimo.model.convert import ConvertConfig, convert
from openmimo.model.hf import load_config, load_model, save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import fairy_1b3, fairy_700m, tiny, tiny_fairy
from openmimo.model.weight_formats import QuantizableModule, quantize_model, train_packed

RULES = [ComplexConfig(), ComplexConfig(conjugate=False, score_scale="complex_dim", gate="swiglu", sub_norms=False)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(module, seed=1):
    """The module in float64 with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def as_complex(x):
    """The complex numbers of [real parts | imaginary parts] along the last axis."""
    return torch.complex(*x.chunk(2, dim=-1))


def as_real(z):
    return torch.cat([z.real, z.imag], dim=-1)


def weight_of(layer):
    return torch.complex(*layer.weight.chunk(2))


def product(layer, z, rule):
    return (z.conj() if rule.conjugate else z) @ weight_of(layer).T


def norm(module, z):
    gain, epsilon = module.weight.chunk(2), module.epsilon
    z = z / ((z.abs() ** 2).mean(-1, keepdim=True) + epsilon).sqrt()
    return torch.complex(z.real * gain[0], z.imag * gain[1])


def gate(z, rule):
    if rule.gate == "swiglu":
        return torch.complex(nn.functional.silu(z.real), nn.functional.silu(z.imag))
    kept = ~((z.real < 0) & (z.imag < 0))
    return torch.complex(z.real**2 * kept, z.imag**2 * kept)


@pytest.mark.parametrize("rule", RULES, ids=["released", "textbook"])
def test_a_linear_layer_is_a_complex_product_and_a_real_one_of_the_stacked_matrix(rule):
    layer, x = drawn(ComplexLinear(10, 6, rule)), draw(5, 10)
    assert torch.allclose(layer(x), as_real(product(layer, as_complex(x), rule)))
    real, imaginary = layer.weight.chunk(2)
    sign = -1 if rule.conjugate else 1
    stacked = torch.cat([torch.cat([real, -sign * imaginary], 1), torch.cat([imaginary, sign * real], 1)])
    assert torch.allclose(layer(x), x @ stacked.T)
    assert torch.equal(layer(x[:0]), torch.zeros(0, 6, dtype=torch.float64))


def test_rotation_is_multiplication_by_a_unit_number_and_scores_depend_on_the_distance():
    dims, base = 12, 10_000.0
    q, k, positions = draw(20, 1, dims), draw(20, 1, dims, seed=1), torch.arange(20) * 3
    tables = rotary_table(positions, dims, base, torch.float64)
    theta = base ** (-torch.arange(dims // 2, dtype=torch.float64) / (dims // 2))
    turn = torch.polar(torch.ones(20, 6, dtype=torch.float64), positions[:, None] * theta)
    assert torch.allclose(apply_rotary(q, *tables), as_real(as_complex(q) * turn[:, None]))
    same_q, same_k = q[:1].expand(20, 1, dims), k[:1].expand(20, 1, dims)
    scores = apply_rotary(same_q, *tables)[:, 0] @ apply_rotary(same_k, *tables)[:, 0].T
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal))
    hermitian = (as_complex(q)[:, 0].conj() @ as_complex(k)[:, 0].T).real
    assert torch.allclose(hermitian, q[:, 0] @ k[:, 0].T)


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("rule", RULES, ids=["released", "textbook"])
def test_attention_is_that_of_complex_heads(rule, sink):
    spec = AttentionConfig(
        "sliding", num_heads=4, num_kv_heads=2, key_dim=8, value_dim=6, rotary_dim=8, rope_theta=100.0,
        window_keys=5, sink=sink,
    )  # fmt: skip
    config = replace(tiny_fairy(), complex_layers=rule)
    place = replace(config.attention_place(1), spec=spec, hidden_size=10, value_scale=0.7)
    module, x = drawn(ComplexAttention(place, rule, 1e-5)), draw(9, 10)
    z = as_complex(x)
    q, k, v = (product(layer, z, rule) for layer in (module.q_proj, module.k_proj, module.v_proj))
    theta = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones(9, 4, dtype=torch.float64), torch.arange(9.0)[:, None] * theta)[:, None]
    q, k, v = q.view(9, 4, 4) * turn, (k.view(9, 2, 4) * turn).repeat_interleave(2, 1), 0.7 * v.view(9, 2, 3)
    scale = 4**-0.5 if rule.score_scale == "complex_dim" else 8**-0.5
    scores = torch.einsum("tnk,snk->nts", q.conj(), k).real * scale
    distance = torch.arange(9)[:, None] - torch.arange(9)
    scores = scores.masked_fill((distance < 0) | (distance >= 5), -torch.inf)
    if sink:
        scores = torch.cat([scores, module.attention_sink_bias[:, None, None].expand(4, 9, 1)], -1)
    weights = scores.softmax(-1)[..., :9].to(torch.complex128)
    out = torch.einsum("nts,snv->tnv", weights, v.repeat_interleave(2, 1)).flatten(1)
    if rule.sub_norms:
        out = norm(module.sub_norm, out)
    expected = as_real(product(module.o_proj, out, rule))
    assert torch.allclose(module(x, PackedContext((9,))), expected)


@pytest.mark.parametrize("rule", RULES, ids=["released", "textbook"])
def test_norm_gate_ffn_and_merge(rule):
    x, up = draw(7, 8), draw(7, 8, seed=1)
    x[0] = torch.tensor([-1.0, 2, -3, 0, -1, -1, 0, 0])
    complex_norm = drawn(ComplexNorm(8, 1e-2))
    assert torch.allclose(complex_norm(x), as_real(norm(complex_norm, as_complex(x))))
    expected = gate(as_complex(x), rule).conj() * as_complex(up)
    assert torch.allclose(gated(x, up, rule), as_real(expected))
    ffn, z = drawn(ComplexFFN(8, 12, rule, 1e-5)), as_complex(x)
    hidden = gate(product(ffn.gate_proj, z, rule), rule).conj() * product(ffn.up_proj, z, rule)
    hidden = norm(ffn.sub_norm, hidden) if rule.sub_norms else hidden
    assert torch.allclose(ffn(x), as_real(product(ffn.down_proj, hidden, rule)))
    merge = drawn(ComplexMerge(8, rule))
    both = torch.cat([as_complex(x), as_complex(up)], dim=-1)
    assert torch.allclose(merge(torch.cat([x, up], -1)), as_real(product(merge, both, rule)))


@pytest.mark.parametrize("rule", RULES, ids=["released", "textbook"])
def test_experts_are_ffns_summed_by_weight(rule):
    moe = MoEConfig(num_experts=5, experts_per_token=2, expert_dim=6)
    experts, x = drawn(ComplexExperts(8, moe, rule, 1e-5)), draw(11, 8)
    ids = torch.rand(11, 4, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :2]  # expert 4 is idle
    weights = draw(11, 2, seed=2).abs()
    expected = torch.zeros_like(x)
    for expert in range(5):
        ffn = ComplexFFN(8, 6, rule, 1e-5).double()
        gate_weight, up_weight = experts.gate_up_proj[expert].chunk(2)
        ffn.gate_proj.weight, ffn.up_proj.weight = nn.Parameter(gate_weight), nn.Parameter(up_weight)
        ffn.down_proj.weight = nn.Parameter(experts.down_proj[expert])
        ffn.sub_norm = experts.sub_norm
        chosen = (weights * (ids == expert)).sum(-1, keepdim=True)
        expected = expected + chosen * ffn(x)
    assert torch.allclose(experts(x, ids, weights), expected)
    assert torch.equal(experts(x[:0], ids[:0], weights[:0]), x[:0])


# --- models ----------------------------------------------------------------------------------------------------------


def small_config():
    """A hybrid model with sinks, experts and an MTP head."""
    base = tiny_config(mtp_heads=1, num_layers=4)
    layers = tuple(replace(layer, attention=replace(layer.attention, rotary_dim=24)) for layer in base.layers)
    mtp = replace(base.mtp, attention=replace(base.mtp.attention, rotary_dim=24))
    return replace(base, layers=layers, mtp=mtp, complex_layers=ComplexConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fairy") / "model"
    save_model(randomize(MiMo(small_config()), 3), path)
    return path


@pytest.fixture(scope="module")
def packed_folder(folder):
    path = folder.parent / "packed"
    config = ConvertConfig(quantize="fairy", dtype="float32")
    convert(folder, path, config, start=lambda total: lambda num_bytes: None)
    return path


IDS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.inference_mode():
        return model.logits(IDS)


def test_a_checkpoint_states_that_it_is_complex(folder):
    assert load_config(folder).complex_layers == ComplexConfig()
    model = load_model(folder)
    assert torch.equal(logits(model), logits(randomize(MiMo(small_config()), 3)))
    changed = replace(small_config(), complex_layers=replace(ComplexConfig(), conjugate=False))
    other = randomize(MiMo(changed), 3)
    assert (logits(other) - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize(
    "weights",
    ["plain", "fairy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "ternary", "binary"))],
)
def test_decoding_is_the_full_pass_and_drafts_do_not_change_the_text(folder, weights):
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=True)
    prompts = [IDS[:20].tolist(), IDS[5:12].tolist()]
    plain, drafted = (LLM(folder, weights=weights, speculative=speculative) for speculative in (False, True))
    texts = [[c.token_ids for c in llm.generate(prompts, params)] for llm in (plain, drafted)]
    assert texts[0] == texts[1]
    for prompt, completion in zip(prompts, plain.generate(prompts, params), strict=True):
        ids = torch.tensor([*prompt, *completion.token_ids])
        with torch.inference_mode():
            scores = plain.model.logits(ids)[len(prompt) - 1 : -1].log_softmax(-1)
        full = scores.gather(1, ids[len(prompt) :, None])[:, 0]
        # int8 inputs may round to another level where two ways to add differ in the last bit.
        tolerance = 1e-4 if weights == "plain" else 2e-2
        assert torch.allclose(torch.tensor(completion.logprobs), full, atol=tolerance)


def test_a_packed_checkpoint_is_served_as_the_model_quantized_in_memory(folder, packed_folder):
    packed, in_memory = load_model(packed_folder, weights="fairy"), load_model(folder)
    quantize_model(in_memory, Packing("fairy"))
    assert torch.equal(logits(packed), logits(in_memory))
    modules = [module for module in packed.modules() if isinstance(module, QuantizableModule)]
    held = [module.held_weight(name) for module in modules for name in module.blocks]
    assert {weight.format for weight in held} == {"fairy"}
    numbers = sum(weight.shape.numel() for weight in held)
    assert 1.0 < sum(weight.nbytes for weight in held) * 8 / numbers < 1.25
    with pytest.raises(ConfigError, match="fairy2i is for real weights"):
        load_model(folder, weights="fairy2i")


def test_presets_have_the_published_sizes():
    for preset, complex_weights in ((fairy_700m(), 679e6), (fairy_1b3(), 1208e6)):
        result = audit(preset)
        tables = 3 * preset.vocab_size * preset.hidden_size // 2  # real numbers: embedding and head, of D each
        in_layers = result.active - preset.vocab_size * preset.hidden_size
        assert in_layers / 2 == pytest.approx(complex_weights, rel=1e-3)
        assert result.main == pytest.approx(in_layers + 4 / 3 * tables, rel=1e-3)
    layers = sum(parameter.numel() for parameter in MiMo(tiny_fairy()).model.layers.parameters())
    real = sum(parameter.numel() for parameter in MiMo(tiny()).model.layers.parameters())
    assert layers / real == pytest.approx(0.5, rel=0.02)


def test_a_complex_weight_is_multiplied_twice():
    real, fairy = tiny(), tiny_fairy()
    head_and_routers = real.hidden_size * (real.vocab_size + 5 * real.moe.num_experts)
    sinks = sum(layer.attention.num_heads for layer in real.layers if layer.attention.sink)
    rest = active_matmul_parameters(real) - head_and_routers - sinks
    assert active_matmul_parameters(fairy) == rest // 2 + head_and_routers + sinks
    assert training_flops_per_token(fairy, 64) == training_flops_per_token(real, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65}, "hidden_size 65"),
        ({"dense_ffn_dim": 97}, "dense_ffn_dim 97"),
        ({"attention_bias": True}, "no biases"),
        ({"layers": tiny_config(num_layers=4).layers}, "rotates 8 of 24"),
    ],
)
def test_what_has_no_complex_form_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(small_config(), **changes)


def test_complex_layers_are_not_divided_among_ranks():
    with pytest.raises(ConfigError, match="complex-valued"):
        small_config().local(tp=2)


def test_a_real_checkpoint_is_not_loaded_as_a_complex_one(folder, tmp_path):
    path = tmp_path / "real"
    save_model(randomize(MiMo(tiny_config()), 1), path)
    (path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError):
        load_model(path)


# --- quantization-aware training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [Packing("fairy"), pytest.param(Packing("fairy2i", 2), marks=pytest.mark.slow)])
def test_a_trained_model_computes_what_its_packed_form_computes(packing):
    config = tiny_config(mtp_heads=1, num_layers=3) if packing.format == "fairy2i" else small_config()
    model, packed = (randomize(MiMo(config), 3) for _ in range(2))
    plain = logits(model)
    train_packed(model, packing)
    quantize_model(packed, packing)
    assert (logits(model) - logits(packed)).abs().mean() < 0.02 * (logits(model) - plain).abs().mean()
    train_packed(model, None)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", ["fairy", "ternary", "binary"])
def test_the_gradient_passes_the_quantizer_unchanged(name):
    """With inputs that are int8 levels already, the gradient of the weight is that of the plain product."""
    layer = drawn(ComplexLinear(8, 6, ComplexConfig())).float()
    x = torch.randint(-127, 128, (5, 8), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = x[:, 4] = 127
    upstream = draw(5, 6).float()
    plain = torch.autograd.grad((layer(x) * upstream).sum(), layer.weight)[0]
    train_packed(layer, Packing(name))
    trained = torch.autograd.grad((layer(x) * upstream).sum(), layer.weight)[0]
    assert torch.allclose(trained, plain, rtol=1e-4, atol=1e-3)
