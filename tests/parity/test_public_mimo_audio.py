"""Stages of the audio language model against the public code of MiMo-Audio, on a small random model in float32."""

import json

import pytest
import torch
from public_mimo_audio import public_module, public_text
from safetensors.torch import save_file

from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.audio.cache import BackboneCache
from openmimo.model.audio.context import StepContext
from openmimo.model.audio.language import load_audio_model
from openmimo.model.audio.sequence import (
    ALL_SPECIAL_TOKENS,
    AudioPart,
    SequenceBuilder,
    SpeechPart,
    TextPart,
)
from openmimo.model.context import PackedContext

LANGUAGE, SEGMENTS = "src/mimo_audio/modeling_mimo_audio.py", "src/mimo_audio/process_speechdata.py"
EMPTY_IDS = [16, 16, 8, 8, 8, 8, 8, 8]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["hello world, what a fine day it is to speak"] * 5, 300, ALL_SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def public(tokenizer):
    """The public class with random weights, in float32 instead of the bfloat16 that it names in one place."""
    text = public_text(LANGUAGE)
    assert text.count("dtype=torch.bfloat16") == 1
    module = public_module(LANGUAGE, "public_language", replace=("dtype=torch.bfloat16", "dtype=torch.float32"))
    config = module.MiMoAudioConfig(
        vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_theta=640000.0, rms_norm_eps=1e-6, max_position_embeddings=512,
        tie_word_embeddings=False, group_size=4, audio_channels=8, speech_vocab_size="17-17-9-9-9-9-9-9",
        speech_zeroemb_idx="16-16-8-8-8-8-8-8", local_dim=32, local_layers=3, local_attn_heads=4, local_ffn_dim=64,
        input_local_layers=2, input_local_dim=32, input_full_attention=True, initializer_range=0.2,
    )  # fmt: skip
    ids = tokenizer.special_tokens
    arguments = module.MiMoAudioArguments(
        model_name_or_path="", sosp_idx=ids["<|sosp|>"], eosp_idx=ids["<|eosp|>"], sostm_idx=ids["<|sostm|>"],
        eostm_idx=ids["<|eostm|>"], eot_idx=ids["<|eot|>"], empty_idx=ids["<|empty|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = module.MiMoAudioForCausalLM(config, arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.sampler = module.MiMoSampler(do_sample=False)
    return model


@pytest.fixture(scope="module")
def folder(public, tokenizer, tmp_path_factory):
    """The public model as a folder."""
    path = tmp_path_factory.mktemp("public")
    save_file({name: tensor.contiguous() for name, tensor in public.state_dict().items()}, path / "model.safetensors")
    values = {key: value for key, value in public.config.to_dict().items() if value is not None}
    names = (*released_keys(), "vocab_size", "hidden_size", "rms_norm_eps", "tie_word_embeddings")
    (path / "config.json").write_text(json.dumps({name: values[name] for name in names} | {"rope_theta": 640000.0}))
    tokenizer.save(path)
    return path


def released_keys():
    return (
        "model_type", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "max_position_embeddings", "group_size", "audio_channels", "delay_pattern",
        "speech_vocab_size", "speech_zeroemb_idx", "local_dim", "local_layers", "local_attn_heads", "local_ffn_dim",
        "local_attn_dropout", "input_local_layers", "input_local_dim", "input_full_attention",
    )  # fmt: skip


@pytest.fixture(scope="module")
def ours(folder):
    return load_audio_model(folder)


@pytest.fixture(scope="module")
def sequence(ours, tokenizer):
    generator = torch.Generator().manual_seed(1)
    codes = torch.stack([torch.randint(0, most, (22,), generator=generator) for most in EMPTY_IDS], dim=1)
    builder = SequenceBuilder(tokenizer, ours.audio)
    parts = [TextPart("hello "), AudioPart(codes), SpeechPart("what a fine day it is to speak", codes[:13])]
    return builder.build(parts)


def public_ids(sequence):
    """The ids [1, 1 + Q, 4 T] of the public code: text ids at the first frame of each position, else -100."""
    T, H, _ = sequence.codes_THQ.shape
    text = torch.full((T, H), -100)
    text[:, 0] = sequence.text_ids_T
    codes = sequence.codes_THQ.permute(2, 0, 1).flatten(1)
    return torch.cat([text.flatten()[None], codes])[None]


class PublicTokenizer:
    """The methods of a transformers tokenizer that the public code calls."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([self.tokenizer.encode(text, allow_special=True)])}

    def convert_tokens_to_ids(self, token):
        return self.tokenizer.special_tokens[token]


def test_sequences_equal_those_of_the_public_segments(sequence, ours, tokenizer):
    module = public_module(SEGMENTS, "public_segments")
    text_codes = sequence.codes_THQ[sequence.is_patch_T]
    empty, public_tokenizer = tokenizer.special_tokens["<|empty|>"], PublicTokenizer(tokenizer)
    shared = {"speech_zeroemb_idx": EMPTY_IDS, "text_zeroemb_idx": empty}
    segments = [
        module.InputSegment(text="hello ", **shared),
        module.InputSegment(audio=text_codes[:6].flatten(), **shared),
        module.StreamingInputSegment(
            text="what a fine day it is to speak",
            audio=text_codes[6:].flatten(),
            tokenizer=public_tokenizer,
            group_size=4,
            audio_channels=8,
            **shared,
        ),
    ]
    ids = torch.cat([segment.to_input_id(public_tokenizer, 4, 8) for segment in segments], dim=1)
    assert torch.equal(ids[None].long(), public_ids(sequence))


def test_weights_load_strictly_both_ways(ours, public):
    public.load_state_dict(ours.state_dict(), strict=True)
    assert {name: tuple(t.shape) for name, t in ours.state_dict().items()} == {
        name: tuple(t.shape) for name, t in public.state_dict().items()
    }


@torch.no_grad()
def test_the_patch_encoder_of_the_oracle_is_bidirectional(public, sequence):
    ids = public_ids(sequence)
    changed = ids.clone()
    patch = int(sequence.is_patch_T.nonzero()[0])
    changed[0, 1, 4 * patch + 3] = (changed[0, 1, 4 * patch + 3] + 1) % 16  # the last frame
    embeddings = torch.zeros(1, 1, 4, 32).normal_(generator=torch.Generator().manual_seed(2))
    before = public.apply_input_local_transformer(embeddings)
    embeddings[0, 0, 3] += 1
    assert not torch.allclose(before[0, 0, 0], public.apply_input_local_transformer(embeddings)[0, 0, 0])
    assert not torch.equal(public._prepare_input_embeds(ids), public._prepare_input_embeds(changed))


@torch.no_grad()
def test_stages(ours, public, sequence, record_property):
    theirs_TD = public._prepare_input_embeds(public_ids(sequence))[0]
    ours_TD = ours.embed(sequence)
    states_TD = ours.states(sequence, PackedContext((len(sequence),))).post_norm_TD
    logits_TV = ours.head(states_TD)
    hidden = public.model(inputs_embeds=theirs_TD[None]).last_hidden_state
    expected_TV = public.lm_head(hidden)[0]
    errors = {"embeddings": error(ours_TD, theirs_TD), "logits": error(logits_TV, expected_TV)}

    recorded = {}
    hooks = [
        head.register_forward_hook(
            lambda *call, number=number: recorded.setdefault(number, []).append(call[2][0, -1].clone())
        )
        for number, head in enumerate(public.local_transformer_lm_heads)
    ]
    local = public.hidden_states_downcast(hidden[:, -1:])
    codes_HQ = public.local_forward(local, torch.int64, torch.device("cpu"), public.sampler)[0]
    for hook in hooks:
        hook.remove()
    local_logits = ours.local_logits(states_TD[-1:], codes_HQ[None])
    errors["local logits"] = max(
        error(logits_PHV[0], torch.stack(recorded[number])) for number, logits_PHV in enumerate(local_logits)
    )
    generated = ours.generate_patch(
        states_TD[-1], StepContext(11), lambda logits, codebook, frame: int(logits.argmax())
    )
    print(errors)
    for stage, value in errors.items():
        record_property(stage, value)
        assert value < 1e-4, (stage, value)
    assert torch.equal(logits_TV.argmax(-1), expected_TV.argmax(-1))
    assert torch.equal(generated, codes_HQ)


@torch.no_grad()
def test_greedy_generation(ours, public, sequence, tokenizer):
    """20 positions, text and patches in turn; the oracle runs without a cache, our backbone with pages."""
    cache, builder = BackboneCache(ours, len(sequence) + 20), SequenceBuilder(tokenizer, ours.audio)
    ids, added = public_ids(sequence), sequence
    for number in range(20):
        state_D = cache.run(ours.embed(added))[-1]
        hidden = public.model(inputs_embeds=public._prepare_input_embeds(ids)).last_hidden_state[:, -1:]
        token = int(public.lm_head(hidden).argmax())
        assert int(ours.head(state_D[None]).argmax()) == token
        if number % 2:
            local = public.hidden_states_downcast(hidden)
            codes_HQ = public.local_forward(local, torch.int64, torch.device("cpu"), public.sampler)[0]
            assert torch.equal(ours.generate_patch(state_D, StepContext(11), lambda x, *_: int(x.argmax())), codes_HQ)
            added = builder.patches(codes_HQ[None])
        else:
            added = builder.text([token])
        ids = torch.cat([ids, public_ids(added)], dim=2)


def error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())
