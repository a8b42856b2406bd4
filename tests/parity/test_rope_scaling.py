"""Extension of RoPE: frequencies and cos/sin equal those of transformers, and config.json keeps the method."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import openmimo
from openmimo.core.errors import ConfigError
from openmimo.core.records import SamplingParams
from openmimo.engine.llm import LLM
from openmimo.kernels.operations import rotary_table
from openmimo.model.alibi import slopes
from openmimo.model.attention import AttentionPlace, RopeScaling, build_attention
from openmimo.model.context import PackedContext
from openmimo.model.hf_config import config_from_hf, config_to_hf
from openmimo.model.mimo import MiMo

HALF = 12
LONG = tuple(1.0 + 0.7 * pair for pair in range(HALF))
SCALINGS = {
    "linear": (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        RopeScaling("yarn", 16.0, 256),
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256},
    ),
    "yarn with other limits": (
        RopeScaling("yarn", 8.0, 4096, beta_fast=16.0, beta_slow=2.0, amplitude=1.3),
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0,
         "beta_slow": 2.0, "attention_factor": 1.3},
    ),
    "longrope": (
        RopeScaling("longrope", 8.0, 512, divisors=LONG),
        {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 512, "long_factor": list(LONG),
         "short_factor": [1.0] * HALF},
    ),
}  # fmt: skip


def theirs(parameters, theta):
    config = LlamaConfig(
        hidden_size=8 * HALF, num_attention_heads=4, max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, **parameters},
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=4096)


@pytest.mark.parametrize("theta", [1e4, 5e6])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, theta):
    scaling, parameters = SCALINGS[name]
    frequencies, amplitude = theirs(parameters, theta)
    rotation = scaling.rotation(2 * HALF, theta)
    plain = theta ** (-torch.arange(HALF, dtype=torch.float64) / HALF)
    torch.testing.assert_close(plain / torch.tensor(rotation.divisors), frequencies.double(), rtol=1e-6, atol=0)
    assert rotation.amplitude == pytest.approx(amplitude)
    positions = torch.tensor([0, 1, 77, 4000])
    cos, sin = rotary_table(positions, *rotation[:2], torch.float32, *rotation[2:])
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    torch.testing.assert_close(cos, angles.cos() * amplitude, rtol=0, atol=2e-3)
    torch.testing.assert_close(sin, angles.sin() * amplitude, rtol=0, atol=2e-3)


def test_ntk_is_a_raised_base_that_divides_the_lowest_frequency_by_the_factor():
    config = tiny_config().with_full_rope(None, RopeScaling("ntk", 8.0))
    spec = config.layers[0].attention
    rotation = spec.rotation
    assert rotation.divisors[0] == 1.0 and rotation.divisors[-1] == pytest.approx(8.0)
    written = config_to_hf(config)["rope_parameters"]["full_attention"]
    assert written["rope_type"] == "default"
    positions = torch.arange(200)
    expected = rotary_table(positions, spec.rotary_dim, written["rope_theta"], torch.float64)
    found = rotary_table(positions, *rotation[:2], torch.float64, *rotation[2:])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", SCALINGS)
def test_config_json_keeps_the_method_and_transformers_keeps_the_model_class(name):
    scaling, _ = SCALINGS[name]
    config = tiny_config()
    if scaling.divisors:
        half = config.layers[0].attention.rotary_dim // 2
        scaling = replace(scaling, divisors=LONG[:half])
    config = replace(config.with_full_rope(None, scaling), max_positions=4096)
    values = config_to_hf(config)
    assert config_from_hf(values) == config
    assert values["rope_parameters"]["sliding_attention"]["rope_type"] == "default"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "yarn"])
def test_logits_equal_those_of_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM

    config = tiny_config().with_full_rope(None, SCALINGS[name][0])
    model = randomize(MiMo(config), 3)
    openmimo.save_model(model, tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (90,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), other(ids[None]).logits[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.logits(ids), randomize(MiMo(tiny_config()), 3).logits(ids), atol=1e-3)


def with_full_layers(config, **changes):
    layers = [
        replace(layer, attention=replace(layer.attention, **changes)) if layer.attention.kind == "full" else layer
        for layer in config.layers
    ]
    return replace(config, layers=tuple(layers))


@pytest.mark.parametrize("kind", ["yarn", "none", "alibi"])
def test_the_engine_continues_as_a_whole_pass(kind):
    config = tiny_config()
    if kind == "yarn":
        config = config.with_full_rope(None, RopeScaling("yarn", 4.0, 64))
    else:
        config = with_full_layers(config, rotary_dim=0, kind="alibi" if kind == "alibi" else "full")
    model = randomize(MiMo(config), 3).double()
    ids = torch.randint(0, config.vocab_size, (120,), generator=torch.Generator().manual_seed(2)).tolist()
    llm = LLM(model, prefill_tokens=32)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=True)
    answer = llm.generate([ids], params)[0]
    whole = torch.tensor([*ids, *answer.token_ids])
    expected = model.logits(whole)[len(ids) - 1 : -1].argmax(-1)
    assert answer.token_ids == expected.tolist()
    if kind != "yarn":  # transformers has no such layers, so it must refuse the folder
        assert config_to_hf(config)["architectures"] == ["OpenMiMoForCausalLM"]
        assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_alibi_subtracts_the_slope_times_the_distance(dtype, tolerance):
    """Against biases that are added to the logits, at positions of several digits."""
    spec = replace(tiny_config().layers[0].attention, kind="alibi", rotary_dim=0)
    place = AttentionPlace(spec, 0, 24, bias=False, value_scale=1.0, is_source=False)
    layer = randomize(build_attention(place), 4).to(dtype)
    length = 700
    x = torch.randn(length, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = layer(x, PackedContext((length,)))
    N, G, K = spec.num_heads, spec.num_kv_heads, spec.key_dim
    q = layer.q_proj(x).view(length, N, K)
    k = layer.k_proj(x).view(length, G, K).repeat_interleave(N // G, 1)
    v = layer.v_proj(x).view(length, G, spec.value_dim).repeat_interleave(N // G, 1)
    distance = (torch.arange(length)[:, None] - torch.arange(length)).to(dtype)
    bias = -torch.tensor(slopes(N), dtype=dtype)[:, None, None] * distance
    logits = torch.einsum("tnk,snk->nts", q, k) / K**0.5 + bias
    weights = logits.masked_fill(distance < 0, float("-inf")).softmax(-1)
    expected = layer.o_proj(torch.einsum("nts,snv->tnv", weights, v).reshape(length, -1))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_slopes_are_those_of_the_paper():
    assert slopes(8) == [2.0**-power for power in range(1, 9)]
    assert slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    with pytest.raises(ConfigError, match="must be 0"):
        with_full_layers(tiny_config(), kind="alibi")
    with pytest.raises(ConfigError, match="sink"):
        with_full_layers(tiny_config(), kind="alibi", rotary_dim=0, sink=True)


def test_the_base_and_flat_rope_scaling_of_older_files():
    values = config_to_hf(tiny_config())
    old = values | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    for kind in ("full_attention", "sliding_attention"):
        assert "factor" not in values["rope_parameters"][kind]
    config = config_from_hf(old)
    assert {layer.attention.rope_scaling for layer in config.layers} == {RopeScaling("linear", 2.0)}
    yarn = {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096}  # fmt: skip
    config = config_from_hf(values | {"rope_scaling": yarn})
    amplitude = config.layers[0].attention.rotation.amplitude
    assert amplitude == pytest.approx((0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "depends on the length"),
        ({"type": "linear"}, "needs a factor"),
        ({"type": "yarn", "factor": 2.0, "truncate": False}, "truncate"),
        ({"type": "longrope", "factor": 2.0}, "short_factor and long_factor"),
        ({"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}, "divisors for"),
        ({"type": "unknown"}, "rope_scaling"),
    ],
)
def test_wrong_scalings_are_refused(scaling, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(config_to_hf(tiny_config()) | {"rope_scaling": scaling})
