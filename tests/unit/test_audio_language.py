"""The audio language model against a plain computation from the equations; its folder; its size."""

import json

import pytest
import torch
import torch.nn.functional as F

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.audio.audit import audit_audio, is_audio_model
from openmimo.model.audio.context import StepContext
from openmimo.model.audio.language import AudioLanguageModel, load_audio_model, save_audio_model
from openmimo.model.audio.language_config import (
    AUDIO_PRESETS,
    audio_config_from_hf,
    audio_keys,
    audio_model_config,
    mimo_audio_7b,
    with_codebooks,
)
from openmimo.model.audio.sequence import ALL_SPECIAL_TOKENS, AudioPart, SequenceBuilder, SpeechPart, TextPart
from openmimo.model.context import PackedContext
from openmimo.model.hf import load_model
from openmimo.model.hf_config import config_to_hf

PRESETS = ["tiny_audio", "tiny_audio_hybrid"]


def model_of(name):
    model = AudioLanguageModel(audio_model_config(name))
    model.initialize(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("bias", "norm.weight")):
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["hello world, what a fine day it is to speak"] * 5, 300, ALL_SPECIAL_TOKENS)


@pytest.fixture(scope="module", params=PRESETS)
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def sequence(tokenizer):
    codes = torch.randint(0, 128, (22, 8), generator=torch.Generator().manual_seed(0))
    parts = [TextPart("hello "), AudioPart(codes), SpeechPart("what a fine day it is", codes + 0)]
    return SequenceBuilder(tokenizer, audio_model_config("tiny_audio")).build(parts)


def plain_transformer(x_TD, weights, config, theta, *, causal, epsilon):
    """RMSNorm, rotary attention with biases, SwiGLU, in double precision; the published local transformer."""
    T, heads = len(x_TD), config.num_heads
    dim = config.dim // heads
    angles = torch.arange(T)[:, None] / theta ** (torch.arange(0, dim, 2) / dim)
    cos, sin = (torch.cat([f(angles.double())] * 2, dim=1)[:, None] for f in (torch.cos, torch.sin))

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weights[name]

    def project(x, name):
        return (x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]).view(T, heads, dim)

    def rotate(x):
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1) * sin

    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        y = norm(x_TD, f"{prefix}input_layernorm.weight")
        q, k, v = (project(y, f"{prefix}self_attn.{name}_proj") for name in "qkv")
        scores = torch.einsum("tnk,snk->nts", rotate(q), rotate(k)) / dim**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        out = torch.einsum("nts,snk->tnk", scores.softmax(-1), v).reshape(T, -1)
        x_TD = x_TD + out @ weights[f"{prefix}self_attn.o_proj.weight"].T
        y = norm(x_TD, f"{prefix}post_attention_layernorm.weight")
        gate, up = (y @ weights[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x_TD = x_TD + (F.silu(gate) * up) @ weights[f"{prefix}mlp.down_proj.weight"].T
    return norm(x_TD, "norm.weight")


def weights_below(model, prefix):
    state = model.state_dict()
    return {name.removeprefix(prefix): value.double() for name, value in state.items() if name.startswith(prefix)}


@torch.no_grad()
def test_patch_embeddings_equal_a_plain_computation(model, sequence):
    codes_PHQ, config = sequence.codes_THQ[sequence.is_patch_T], model.audio
    weights, state = weights_below(model, "input_local_transformer."), weights_below(model, "")
    tables = [state[f"speech_embeddings.{number}.weight"] for number in range(8)]
    expected = []
    for codes_HQ in codes_PHQ[:3]:
        x_HL = sum(table[codes_HQ[:, number]] for number, table in enumerate(tables))
        y_HL = plain_transformer(
            x_HL, weights, config.encoder, config.local_rope_theta, causal=False, epsilon=model.config.norm_epsilon
        )
        expected.append(state["speech_group_downcast.weight"] @ y_HL.flatten())
    torch.testing.assert_close(model.embed_patches(codes_PHQ[:3]).double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_local_logits_equal_a_plain_computation(model, sequence):
    codes_HQ, config = sequence.codes_THQ[sequence.is_patch_T][1], model.audio
    state_D = torch.randn(128, generator=torch.Generator().manual_seed(3))
    weights, state = weights_below(model, "local_transformer."), weights_below(model, "")
    inputs = [state["hidden_states_downcast.weight"] @ state_D.double()]
    for step in range(config.local_steps - 1):
        frames = [(number, step - number) for number in range(8) if 0 <= step - number < 4]
        inputs.append(sum(state[f"speech_embeddings.{q}.weight"][codes_HQ[f, q]] for q, f in frames))
    out_SL = plain_transformer(
        torch.stack(inputs),
        weights,
        config.decoder,
        config.local_rope_theta,
        causal=True,
        epsilon=model.config.norm_epsilon,
    )
    for number, logits_PHV in enumerate(model.local_logits(state_D[None], codes_HQ[None])):
        expected = out_SL[number : number + 4] @ state[f"local_transformer_lm_heads.{number}.weight"].T
        torch.testing.assert_close(logits_PHV[0].double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generated_codes_are_the_argmax_of_the_logits_given_them(model, sequence):
    state_D = torch.randn(128, generator=torch.Generator().manual_seed(4))
    codes_HQ = model.generate_patch(state_D, StepContext(11), lambda logits, *_: int(logits.argmax()))
    for number, logits_PHV in enumerate(model.local_logits(state_D[None], codes_HQ[None])):
        assert torch.equal(logits_PHV[0, :, : model.audio.empty_ids[number]].argmax(-1), codes_HQ[:, number])


@torch.no_grad()
def test_no_position_sees_a_later_one(model, sequence):
    def outputs(changed):
        states_TD = model.states(changed, PackedContext((len(changed),))).post_norm_TD
        codes_PHQ = changed.codes_THQ[changed.is_patch_T]
        return model.head(states_TD), model.local_logits(states_TD[changed.is_patch_T.nonzero()[:, 0] - 1], codes_PHQ)

    logits_TV, local = outputs(sequence)
    place = int(sequence.is_patch_T.nonzero()[7])
    codes_THQ = sequence.codes_THQ.clone()
    codes_THQ[place, 2, 3] = (codes_THQ[place, 2, 3] + 1) % 128
    text_ids_T = torch.where(torch.arange(len(sequence)) > place, sequence.text_ids_T.flip(0), sequence.text_ids_T)
    text_ids_T = torch.where(sequence.is_patch_T, sequence.text_ids_T, text_ids_T)
    changed = type(sequence)(text_ids_T, codes_THQ, sequence.is_patch_T, sequence.has_loss_T, (len(sequence),))
    changed_TV, changed_local = outputs(changed)
    assert torch.equal(logits_TV[:place], changed_TV[:place])
    assert not torch.allclose(logits_TV[place], changed_TV[place])
    for number, (before, after) in enumerate(zip(local, changed_local, strict=True)):
        assert torch.equal(before[:7], after[:7])
        known = [frame for frame in range(4) if frame + number <= 2 + 3]  # steps up to that of the changed code
        assert torch.equal(before[7][known], after[7][known])
        unknown = [frame for frame in range(4) if frame + number > 2 + 3]
        assert not unknown or not torch.allclose(before[7][unknown], after[7][unknown])


def test_text_alone_is_computed_as_by_the_text_model(model):
    ids = torch.arange(20)
    from openmimo.model.mimo import MiMo

    text = MiMo(model.config)
    text.load_state_dict({name: value for name, value in model.state_dict().items() if name in text.state_dict()})
    assert torch.equal(model.logits(ids), text.eval().logits(ids))


def test_a_saved_model_loads(model, tokenizer, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "config.json").write_text("{}")
    save_audio_model(model, tmp_path / "model", tokenizer=tokenizer, codec=tmp_path / "tokens")
    loaded = load_audio_model(tmp_path / "model")
    assert loaded.audio == model.audio
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    save_audio_model(loaded, tmp_path / "model")  # keeps the audio tokenizer and the tokenizer
    assert (tmp_path / "model" / "codec" / "config.json").exists()
    assert Tokenizer.load(tmp_path / "model").fingerprint == tokenizer.fingerprint


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    model = model_of("tiny_audio")
    save_audio_model(model, tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(values | {"local_layers": 3, "local_dim": 192}))
    with pytest.raises(CheckpointError, match="missing: .*local_transformer.layers.2"):
        load_audio_model(tmp_path / "model")
    del values["group_size"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="describes no audio language model"):
        load_audio_model(tmp_path / "model")


def test_the_released_model_has_396_million_parameters_besides_the_text_model():
    result = audit_audio(mimo_audio_7b())
    assert (result.backbone, result.extra) == (7_622_619_136, 395_968_512)
    assert {name.split(".")[0] for name in result.shapes} == {
        "model", "lm_head", "input_local_transformer", "speech_group_downcast", "speech_embeddings",
        "hidden_states_downcast", "local_transformer", "local_transformer_lm_heads",
    }  # fmt: skip


def test_the_loader_of_text_models_names_the_right_one(tmp_path):
    save_audio_model(model_of("tiny_audio"), tmp_path / "model")
    assert is_audio_model(str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="audio language model; load it with"):
        load_model(tmp_path / "model")


RELEASED = {
    "architectures": ["MiMoAudioModel"], "model_type": "qwen2", "vocab_size": 151680, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 8192, "rope_theta": 640000,
    "rms_norm_eps": 1e-6, "attention_bias": True, "attention_dropout": 0.0, "use_cache": True,
    "tie_word_embeddings": False, "group_size": 4, "audio_channels": 8, "delay_pattern": "0-1-2-3-4-5-6-7",
    "speech_vocab_size": "1025-1025-129-129-129-129-129-129",
    "speech_zeroemb_idx": "1024-1024-128-128-128-128-128-128", "local_dim": 1024, "local_layers": 16,
    "local_attn_heads": 64, "local_ffn_dim": 4096, "local_attn_dropout": 0.1, "input_local_layers": 6,
    "input_local_dim": 1024, "input_full_attention": True, "n_rvq": 20, "add_input_local_transformer": True,
    "add_speech_sosp_eosp": False,
}  # fmt: skip


def test_the_released_config_is_the_preset():
    assert audio_config_from_hf(RELEASED) == mimo_audio_7b()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delay_pattern": "0-1"}, "2 delays"),
        ({"speech_zeroemb_idx": "1024-1025"}, "empty ids"),
        ({"speech_vocab_size": "many"}, "numbers with '-'"),
        ({"local_attn_heads": 3}, "dim of a head"),
        ({"group_size": 0}, "group_size"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"unknown_key": 1}, "unknown_key"),
        ({"audio_config": {"projection_layers": 2}}, "projection_layers is 2"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        audio_config_from_hf(RELEASED | change)


@pytest.mark.parametrize("name", AUDIO_PRESETS)
def test_configs_survive_config_json(name):
    config = with_codebooks(audio_model_config(name), (32, 16, 8))
    values = config_to_hf(config.backbone) | audio_keys(config)
    assert audio_config_from_hf(json.loads(json.dumps(values))) == config
