"""Generation with an audio language model: caches, streams, several at a time, bad requests."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openmimo.core.errors import ConfigError, DataError, UserError
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.audio.cache import BackboneCache
from openmimo.engine.audio.engine import AudioEngine, AudioParams
from openmimo.model.audio.language import AudioLanguageModel, save_audio_model
from openmimo.model.audio.language_config import audio_model_config
from openmimo.model.audio.sequence import ALL_SPECIAL_TOKENS, AudioPart, TextPart
from openmimo.model.context import PackedContext


class Stream:
    """Holds each frame back until the next one, so that the end of a stream matters."""

    def __init__(self):
        self.held = torch.zeros(0, 8, dtype=torch.int64)

    def push(self, codes_FQ):
        codes_FQ = torch.cat([self.held, codes_FQ])
        self.held = codes_FQ[-1:]
        return Codec.samples(codes_FQ[:-1])

    def finish(self):
        return Codec.samples(self.held)


@dataclass
class Codec:
    """Two samples a frame, which determine its first codes."""

    config = SimpleNamespace(sample_rate=50, codebook_sizes=(256, 256, *(128,) * 6))

    @staticmethod
    def samples(codes_FQ):
        return codes_FQ[:, :2].flatten().float() / 256

    def encode(self, waveform_S):
        if not len(waveform_S):
            raise DataError("the waveform is empty; give at least one sample.")
        frames = -(-len(waveform_S) // 2)
        return torch.randint(0, 128, (frames, 8), generator=torch.Generator().manual_seed(frames))

    def stream(self):
        return Stream()


def random_model(name):
    config = audio_model_config(name)
    model = AudioLanguageModel(replace(config, decoder=replace(config.decoder, num_layers=1)))
    model.initialize(torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = Tokenizer.train(["hello hello hello world, what a fine day it is"] * 5, 300, ALL_SPECIAL_TOKENS)
    model = random_model("tiny_audio_hybrid")
    save_audio_model(model, folder, tokenizer=tokenizer)
    return AudioEngine(folder, codec=Codec())


def speech(samples=30):
    return np.sin(np.arange(samples), dtype=np.float32)


def request(*content):
    return [{"role": "user", "content": [*content]}]


def text(value):
    return {"type": "text", "text": value}


AUDIO = {"type": "audio", "audio": speech()}


@pytest.mark.parametrize("name", ["tiny_audio", "tiny_audio_hybrid"])
@torch.no_grad()
def test_states_with_a_cache_equal_those_without(engine, name):
    """More positions than the window of the sliding layers; the prompt at once, then parts of one and of several."""
    model = random_model(name)
    codes_FQ = torch.randint(0, 128, (160, 8), generator=torch.Generator().manual_seed(0))
    sequence = engine.builder.build([TextPart("hello world"), AudioPart(codes_FQ), TextPart(" hello" * 20)])
    whole_TD = model.states(sequence, PackedContext((len(sequence),))).post_norm_TD
    x_TD = model.embed(sequence)
    cache = BackboneCache(model, len(sequence))
    sizes = [45, *[1] * 12, 3, *[1] * (len(sequence) - 60)]
    cached_TD = torch.cat([cache.run(part) for part in x_TD.split(sizes)])
    torch.testing.assert_close(model.head(cached_TD), model.head(whole_TD), atol=2e-4, rtol=2e-4)


def test_speech_follows_the_given_text_and_streams(engine):
    params = AudioParams(max_tokens=24, seed=1)
    chunks = list(engine.speak(" hello" * 7, params=params))
    assert len(chunks) > 1
    again = np.concatenate(list(engine.speak(" hello" * 7, params=params)))
    assert np.array_equal(np.concatenate(chunks), again)
    other = np.concatenate(list(engine.speak(" hello" * 7, params=AudioParams(max_tokens=24, seed=2))))
    assert not np.array_equal(again[:20], other[:20])


def test_speech_that_cannot_fit_is_refused_and_cut_speech_has_the_reason(engine, monkeypatch):
    empty = engine.builder.tokens.empty

    def head(states_TD, reader=None):
        return torch.nn.functional.one_hot(torch.full((len(states_TD),), empty), 512).float()

    monkeypatch.setattr(engine.model.lm_head, "forward", head)
    assert list(engine.speech(" hello" * 7, params=AudioParams(max_tokens=17)))[-1].finish_reason == "length"
    with pytest.raises(UserError, match="needs about 17 tokens and patches, but max_tokens leaves room for 16"):
        engine.speech(" hello" * 7, params=AudioParams(max_tokens=16))
    with pytest.raises(UserError, match="the model's 1024 positions leaves room for"):
        engine.speech(" hello" * 400)


def test_speech_with_an_instruction_and_in_a_voice(engine, monkeypatch):
    prompts = []
    real = engine.builder.build
    monkeypatch.setattr(engine.builder, "build", lambda parts: prompts.append(real(parts)) or prompts[-1])
    plain, styled, voiced = (
        next(engine.speak(" hello", **options, params=AudioParams(max_tokens=8)))
        for options in ({}, {"instruction": "slowly"}, {"voice": speech(), "instruction": "slowly"})
    )
    assert len(plain) and len(styled) and len(voiced)
    texts = [engine.tokenizer.decode(prompt.text_ids_T.tolist()) for prompt in prompts]
    assert "slowly" not in texts[0]
    assert all(text.count("hello(slowly)") == 1 and text.startswith("system\n") for text in texts[1:])
    assert [int(prompt.is_patch_T.sum()) for prompt in prompts] == [0, 0, 4]  # 30 samples are 15 frames


def test_the_parts_of_a_reply_join_to_the_samples_of_its_codes(engine, monkeypatch):
    generated = []
    real = engine.model.generate_patch
    monkeypatch.setattr(engine.model, "generate_patch", lambda *given: generated.append(real(*given)) or generated[-1])
    waveform = np.concatenate(list(engine.speak(" hello" * 6, params=AudioParams(max_tokens=20))))
    assert np.array_equal(waveform, Codec.samples(torch.cat(generated)).numpy())


def test_generations_do_not_affect_each_other(engine):
    prompts = [request(text("hello"), AUDIO), request(text("what a fine day"))]
    params = [AudioParams(output="interleaved", max_tokens=12, seed=seed, text_temperature=1.0) for seed in (1, 2)]
    alone = [list(engine.generate(prompt, each)) for prompt, each in zip(prompts, params, strict=True)]
    running = [engine.generate(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    left_alone = engine.generate(prompts[0], params[1])
    next(left_alone)
    left_alone.close()
    together = [[], []]
    for _ in range(40):
        for events, generation in zip(together, running, strict=True):
            events += [event for event in [next(generation, None)] if event is not None]
    for one, other in zip(alone, together, strict=True):
        assert [(event.text, event.finish_reason) for event in one] == [
            (event.text, event.finish_reason) for event in other
        ]
        assert all(
            (a.waveform is None) == (b.waveform is None)
            and (a.waveform is None or np.array_equal(a.waveform, b.waveform))
            for a, b in zip(one, other, strict=True)
        )


@pytest.mark.parametrize("output", ["text", "audio", "interleaved"])
def test_outputs(engine, output):
    events = list(engine.chat(request(AUDIO), AudioParams(output=output, max_tokens=25, text_temperature=1.0)))
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason in ("stop", "length")
    has_text = any(event.text for event in events)
    has_sound = any(event.waveform is not None for event in events)
    assert (has_text, has_sound) == {"text": (True, False), "audio": (False, True), "interleaved": (True, True)}[output]


def test_text_output_has_no_audio_even_if_the_model_prefers_it(engine, monkeypatch):
    ids = engine.tokenizer.special_tokens

    def head(states_TD, reader=None):
        logits_TV = torch.zeros(len(states_TD), 512)
        logits_TV[:, [ids["<|sostm|>"], ids["<|empty|>"], ids["<|sosp|>"], ids["<|eostm|>"]]] = 5.0
        logits_TV[:, engine.tokenizer.encode("hello")[0]] = 1.0
        return logits_TV

    monkeypatch.setattr(engine.model.lm_head, "forward", head)
    events = list(engine.generate(request(AUDIO), AudioParams(max_tokens=4)))
    assert all(event.waveform is None for event in events)
    assert "".join(event.text or "" for event in events) == 4 * engine.tokenizer.decode(
        engine.tokenizer.encode("hello")[:1]
    )


def test_transcription_is_text(engine):
    assert isinstance(engine.transcribe(speech(), 50, max_tokens=5), str)
    with pytest.raises(ConfigError, match="openmimo\\[audio\\]"):
        try:
            engine.transcribe(speech(), 100, max_tokens=1)
        except ConfigError:
            raise
        raise ConfigError("openmimo[audio]")  # the packages of the extra are installed


def test_thoughts_are_apart_from_the_reply(engine, monkeypatch):
    tokenizer, ids = engine.tokenizer, engine.tokenizer.special_tokens
    script = [*tokenizer.encode("hm"), ids["</think>"], *tokenizer.encode(" hello"), ids["<|im_end|>"]]

    def head(states_TD, reader=None):
        logits_TV = torch.zeros(len(states_TD), 512)
        logits_TV[:, script.pop(0)] = 1.0
        return logits_TV

    monkeypatch.setattr(engine.model.lm_head, "forward", head)
    events = list(engine.generate(request(text("hello")), AudioParams(thinking=True)))
    assert "".join(event.reasoning or "" for event in events) == "hm"
    assert "".join(event.text or "" for event in events) == " hello"
    assert events[-1].finish_reason == "stop"


def scripted(engine, monkeypatch, script):
    """Lets the model write the ids of a script."""

    def head(states_TD, reader=None):
        logits_TV = torch.zeros(len(states_TD), 512)
        logits_TV[:, script.pop(0)] = 1.0
        return logits_TV

    monkeypatch.setattr(engine.model.lm_head, "forward", head)


def test_thoughts_that_the_limit_ends_are_not_said(engine, monkeypatch):
    half = engine.tokenizer.encode("\u20ac")[:1]  # the first byte of a character: held back until the end
    scripted(engine, monkeypatch, [*engine.tokenizer.encode("hm"), *half])
    params = AudioParams(thinking=True, max_tokens=len(engine.tokenizer.encode("hm")) + 1)
    events = list(engine.generate(request(text("hello")), params))
    assert "".join(event.reasoning or "" for event in events) == "hm\ufffd"
    assert all(event.text is None for event in events) and events[-1].finish_reason == "length"
    scripted(engine, monkeypatch, [*half, engine.tokenizer.special_tokens["</think>"], *engine.tokenizer.encode("a")])
    events = list(engine.generate(request(text("hello")), replace(params, max_tokens=3)))
    assert [(event.reasoning, event.text) for event in events[:-1]] == [("\ufffd", None), (None, "a")]


@pytest.mark.parametrize("output", ["text", "audio", "interleaved"])
def test_events_count_the_ids_and_the_patches(engine, monkeypatch, output):
    patches = []
    real = engine.model.generate_patch
    monkeypatch.setattr(engine.model, "generate_patch", lambda *given: patches.append(1) or real(*given))
    events = list(engine.chat(request(AUDIO), AudioParams(output=output, max_tokens=13)))
    assert sum(event.num_patches for event in events) == len(patches)
    assert events[-1].finish_reason == "stop" or sum(event.num_tokens for event in events) == 13
    assert (output == "text") == (not patches)


def test_audio_is_continued_as_it_is(engine):
    codes_FQ = torch.randint(0, 128, (12, 8))
    parts = [TextPart("<|sosp|>", is_markup=True), AudioPart(codes_FQ, is_bounded=False)]
    events = list(engine.generate(parts, AudioParams(output="audio", max_tokens=6)))
    assert all(event.text is None for event in events)
    assert events[-1].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (request(text("hello " * 3000)), "positions, but the model only 1024"),
        (request({"type": "audio", "audio": "a.wav"}), "audio must be a waveform"),
        (request({"type": "audio", "audio": {"waveform": speech(), "sample_rate": "x"}}), "audio must be a waveform"),
        (request({"type": "audio", "audio": np.zeros((2, 30), np.float32)}), "one channel"),
        (request({"type": "audio", "audio": speech(0)}), "empty"),
    ],
)
def test_bad_prompts_are_refused_before_the_first_event(engine, prompt, message):
    with pytest.raises(UserError, match=message):
        engine.generate(prompt)


def test_another_audio_tokenizer_is_refused(engine, tmp_path):
    codec = Codec()
    codec.config = SimpleNamespace(sample_rate=50, codebook_sizes=(512,) * 8)
    save_audio_model(engine.model, tmp_path / "model", tokenizer=engine.tokenizer)
    with pytest.raises(UserError, match="codebooks of \\[512"):
        AudioEngine(tmp_path / "model", codec=codec)
    with pytest.raises(UserError, match="there is no audio tokenizer in .*codec"):
        AudioEngine(tmp_path / "model")
