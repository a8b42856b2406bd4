"""config.json in both dialects: accepted and refused values."""

import pytest

from openmimo.core.errors import ConfigError
from openmimo.model.hf_config import config_from_hf, config_to_hf
from openmimo.model.presets import PRESETS, flash, tiny_no_sink

HUB = {
    "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "torch_dtype": "bfloat16",
    "vocab_size": 152576, "hidden_size": 4096, "num_hidden_layers": 48, "intermediate_size": 16384,
    "moe_intermediate_size": 2048, "hidden_act": "silu", "num_attention_heads": 64, "num_key_value_heads": 4,
    "head_dim": 192, "v_head_dim": 128, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8,
    "swa_head_dim": 192, "swa_v_head_dim": 128, "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0] + [1, 1, 1, 1, 1, 0] * 7,
    "hybrid_block_size": None, "sliding_window": 128, "sliding_window_size": 128, "attention_chunk_size": 128,
    "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "attention_value_scale": 0.707,
    "attention_bias": False, "attention_dropout": 0.0, "rope_theta": 5000000, "swa_rope_theta": 10000,
    "partial_rotary_factor": 0.334, "max_position_embeddings": 262144, "layernorm_epsilon": 1e-05,
    "moe_layer_freq": [0] + [1] * 47, "n_routed_experts": 256, "n_shared_experts": None, "num_experts_per_tok": 8,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": None, "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip


def test_the_hub_config_is_the_flash_preset():
    config = config_from_hf(HUB, num_mtp_heads=3)
    assert config.layers == flash().layers
    assert config.moe == flash().moe
    assert config.mtp == flash().mtp
    assert (config.norm_epsilon, config.value_scale, config.max_positions) == (1e-5, 0.707, 262144)


def test_the_window_can_be_read_either_way():
    def sliding(**changes):
        config = config_from_hf({**HUB, **changes.pop("values", {})}, **changes)
        return config.layers[1].attention.window_keys

    assert sliding() == 129  # as transformers and SGLang read sliding_window_size
    assert sliding(window_keys=128) == 128
    assert sliding(values={"window_keys": 128}) == 128
    assert sliding(values={"sliding_window_size": None}) == 128  # native: exactly that many keys


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name):
    config = PRESETS[name]()
    assert config_from_hf(config_to_hf(config)) == config


def test_a_missing_swa_value_dim_follows_the_swa_key_dim():
    values = {key: value for key, value in HUB.items() if key != "swa_v_head_dim"}
    assert config_from_hf(values).layers[1].attention.value_dim == 192


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_thetaa": 1}, "rope_theta"),
        ({"rms_norm_eps": 1e-6}, "layernorm_epsilon"),
        ({"layer_types": ["full_attention"] * 48}, "hybrid_layer_pattern"),
        ({"hybrid_layer_pattern": [0, 1]}, "num_hidden_layers"),
        ({"sliding_window": 512}, "sliding_window_size"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"model_type": "llama"}, "model_type"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
        ({"num_key_value_heads": 5}, "key/value heads"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "RoPE base"),
        ({"partial_rotary_factor": 0.3}, "even"),
    ],
)
def test_bad_configs_are_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named):
        config_from_hf({**HUB, **changes})


def test_transformers_is_not_offered_what_it_would_compute_wrongly():
    assert config_to_hf(flash())["architectures"] == ["MiMoV2FlashForCausalLM"]
    assert config_to_hf(tiny_no_sink())["architectures"] == ["OpenMiMoForCausalLM"]
