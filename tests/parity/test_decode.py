"""Decoding with a cache against the whole forward pass, and the offline engine against decoding by definition."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config, tiny_model

import openmimo
from openmimo.core.errors import UserError
from openmimo.core.records import SamplingParams
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.cache import PageArena, PageTables
from openmimo.engine.llm import LLM
from openmimo.engine.step import Span, StepBuffers
from openmimo.engine.worker import PagedContext, RotaryRows
from openmimo.model.mimo import MiMo

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def _ids(count, seed=0, vocab_size=160):
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _arena(model, cache_bytes=1 << 22):
    return PageArena(
        model.config.attention_layers(), cache_bytes=cache_bytes, dtype=model.lm_head.weight.dtype, device="cpu"
    )


def _read(model, arena, rotary, work):
    """Returns logits of the next tokens of some sequences, given (pages, start, tokens) of each."""
    for pages, start, ids in work:
        pages.reach(start + len(ids))
    spans = [Span(pages, start, start + len(ids)) for pages, start, ids in work]
    layers = range(len(model.config.layers))
    sizes = {"max_tokens": 200, "max_sequences": 4, "max_positions": model.config.max_positions}
    buffers = StepBuffers(arena, torch.device("cpu"), layers, **sizes)
    step = buffers.fill(spans, [token for _, _, ids in work for token in ids])
    logits = model.head(model(step.token_ids_T, PagedContext(arena, rotary).bind(step)).post_norm_TD)
    for pages, start, ids in work:
        pages.leave_behind(start + len(ids))
    return logits


def _cached_logits(model, ids, chunk_lengths):
    """Returns logits of one sequence, read in chunks through a cache."""
    arena, rotary = _arena(model), RotaryRows("cpu", model.config.max_positions)
    pages, start, logits = PageTables(arena, margin=0), 0, []
    for length in chunk_lengths:
        logits.append(_read(model, arena, rotary, [(pages, start, ids[start : start + length])]))
        start += length
    return torch.cat(logits)


def _assert_same_logits(found, expected):
    """Equal to 1e-5 of the largest logit in float32, and to rounding in float64."""
    tolerance = 1e-12 if expected.dtype == torch.float64 else 1e-5
    assert (found - expected).abs().max() / expected.abs().max() < tolerance


@pytest.mark.parametrize(
    ("window_keys", "dtype"),
    [
        (9, torch.float64),
        (32, torch.float32),
        pytest.param(9, torch.float32, marks=pytest.mark.slow),
        pytest.param(32, torch.float64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("chunk_lengths", [[150], [64, 64, 22], [90, *[1] * 60], [3] * 50, [40, 1, 7, 102]])
@torch.inference_mode()
def test_reading_in_chunks_changes_nothing(window_keys, chunk_lengths, dtype):
    model, ids = tiny_model(window_keys, window_keys=window_keys).to(dtype), _ids(150)
    _assert_same_logits(_cached_logits(model, ids, chunk_lengths), model.logits(torch.tensor(ids)))


@torch.inference_mode()
def test_packed_sequences_do_not_see_each_other():
    model = tiny_model(1)
    arena, rotary = _arena(model), RotaryRows("cpu", model.config.max_positions)
    sequences = [_ids(60, 1), _ids(41, 2), _ids(5, 3)]
    tables = [PageTables(arena, margin=0) for _ in sequences]
    starts, logits = [0, 0, 0], [[], [], []]
    for lengths in [(40, 20, 1), (1, 20, 3), (19, 1, 1)]:
        news = [ids[start : start + n] for ids, start, n in zip(sequences, starts, lengths, strict=True)]
        out = _read(model, arena, rotary, list(zip(tables, starts, news, strict=True)))
        for rows, mine in zip(logits, out.split(lengths), strict=True):
            rows.append(mine)
        starts = [start + n for start, n in zip(starts, lengths, strict=True)]
    for ids, rows in zip(sequences, logits, strict=True):
        _assert_same_logits(torch.cat(rows), model.logits(torch.tensor(ids)))


@torch.inference_mode()
def _greedy_by_definition(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(model.logits(torch.tensor(ids))[-1].argmax().item())
    return ids[len(prompt) :]


def test_greedy_generation_by_definition():
    """Prompts shorter and longer than the window and than a prefill pass, in one batch."""
    model = tiny_model(2)
    prompts = [_ids(length, length) for length in (1, 2, 8, 9, 10, 40, 77)]
    expected = [_greedy_by_definition(model, prompt, 12) for prompt in prompts]
    for settings in ({}, {"prefill_tokens": 16}, {"max_sequences": 3}):
        completions = LLM(model, **settings).generate(prompts, GREEDY)
        assert [completion.token_ids for completion in completions] == expected
        assert [completion.prompt_token_ids for completion in completions] == prompts
        assert {completion.finish_reason for completion in completions} == {"length"}


@pytest.mark.parametrize("heads", [0, 2])
def test_a_seed_gives_the_same_tokens_in_any_batch(heads):
    # In float32, rounding depends on the batch size, which changes a draw once in 10,000 tokens.
    model = tiny_model(3, mtp_heads=heads).to(torch.float64)
    prompts = [_ids(length, length) for length in (5, 30, 12, 50)]
    params = [
        SamplingParams(max_tokens=25, temperature=1.0, seed=11),
        SamplingParams(max_tokens=9, temperature=0.0),
        SamplingParams(max_tokens=40, temperature=0.7, top_p=0.9, seed=12, logprobs=True),
        SamplingParams(max_tokens=3, temperature=1.5, top_k=20, seed=11),
    ]
    together = LLM(model).generate(prompts, params)
    alone = [LLM(model).generate([prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert together[0].logprobs is None
    assert together[2].logprobs == pytest.approx(alone[2].logprobs, abs=1e-4)
    assert [len(c.token_ids) for c in together] == [25, 9, 40, 3]


def test_without_a_seed_texts_differ():
    llm = LLM(tiny_model(3))
    first, second = llm.generate([_ids(5)] * 2, SamplingParams(max_tokens=20, temperature=2.0))
    assert first.token_ids != second.token_ids


@pytest.mark.parametrize("heads", [0, 2])
def test_logprobs_are_those_of_the_whole_forward_pass(heads):
    model = tiny_model(4, mtp_heads=heads)
    prompt = _ids(30)
    for temperature in (0.0, 0.6):
        params = SamplingParams(max_tokens=20, temperature=temperature, top_k=5, seed=1, logprobs=True)
        completion = LLM(model).generate([prompt], params)[0]
        ids = torch.tensor(prompt + completion.token_ids)
        with torch.no_grad():
            logprobs = (model.logits(ids) / (temperature or 1.0)).log_softmax(dim=-1)
        expected = logprobs[:-1].gather(1, ids[1:, None])[len(prompt) - 1 :, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_score_is_the_log_softmax_of_the_logits():
    model, ids = tiny_model(5), torch.tensor(_ids(150))
    with torch.no_grad():
        expected = model.logits(ids).log_softmax(dim=-1)[:-1].gather(1, ids[1:, None])[:, 0]
    scores = LLM(model).score(ids.tolist())
    assert scores.shape == (149,)
    assert (scores - expected).abs().max() < 1e-5


def test_a_sequence_ends_at_the_last_position_of_the_model():
    model = randomize(MiMo(replace(tiny_config(mtp_heads=3), max_positions=40)), 6)
    completion = LLM(model).generate([_ids(30)], SamplingParams(max_tokens=100, temperature=0.0))[0]
    assert len(completion.token_ids) == 10
    assert completion.finish_reason == "length"


def test_stop_ids_and_the_checkpoints_own():
    config = replace(tiny_config(), token_ids={"eos_token_id": None})
    model = randomize(MiMo(config), 2)
    prompt = _ids(40, 40)
    expected = _greedy_by_definition(model, prompt, 12)
    stop = expected[4]
    end = expected.index(stop) + 1
    model.config = replace(config, token_ids={"eos_token_id": [stop]})
    by_eos = LLM(model).generate([prompt], GREEDY)[0]
    assert (by_eos.token_ids, by_eos.finish_reason) == (expected[:end], "stop")
    ignoring = LLM(model).generate([prompt], replace(GREEDY, ignore_eos=True))[0]
    assert (ignoring.token_ids, ignoring.finish_reason) == (expected, "length")
    by_id = LLM(model).generate([prompt], replace(GREEDY, ignore_eos=True, stop_token_ids=(stop,)))[0]
    assert (by_id.token_ids, by_id.finish_reason) == (expected[:end], "stop")


@pytest.fixture(scope="module")
def text_llm():
    """A random model with a byte tokenizer."""
    tokenizer = Tokenizer.train(["some words to learn from, and some more words"], vocab_size=300)
    model = randomize(MiMo(replace(tiny_config(mtp_heads=2), vocab_size=tokenizer.vocab_size)), 7)
    return LLM(model, tokenizer)


BABBLE = SamplingParams(max_tokens=60, temperature=1.0, seed=5, ignore_eos=True)


def test_text_is_what_the_tokens_say(text_llm):
    completion = text_llm.generate("some words", BABBLE)[0]
    assert completion.prompt_token_ids == text_llm.tokenizer.encode("some words")
    assert completion.text == text_llm.tokenizer.decode(completion.token_ids)
    assert "".join(text_llm.stream("some words", BABBLE)) == completion.text


@pytest.mark.parametrize("place", [3, 17, 30])
def test_stop_strings_never_show(text_llm, place):
    whole = text_llm.generate("some words", BABBLE)[0]
    stop = whole.text[place : place + 3]
    stopping = replace(BABBLE, stop=("never said", stop))
    completion = text_llm.generate("some words", stopping)[0]
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert completion.finish_reason == "stop"
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert stop in text_llm.tokenizer.decode(completion.token_ids)
    pieces = list(text_llm.stream("some words", stopping))
    assert "".join(pieces) == completion.text


def test_the_start_of_a_stop_string_that_never_ends_is_text(text_llm):
    whole = text_llm.generate("some words", BABBLE)[0].text
    assert text_llm.generate("some words", replace(BABBLE, stop=(whole[-4:] + "no",)))[0].text == whole


def test_a_checkpoint_folder_is_all_it_takes(text_llm, tmp_path):
    openmimo.save_model(text_llm.model, tmp_path)
    assert LLM(tmp_path).generate([[1, 2, 3]], GREEDY)[0].text == ""
    text_llm.tokenizer.save(tmp_path)
    llm = LLM(str(tmp_path), device="cpu")
    assert llm.num_drafts == 2
    assert llm.generate("some words", BABBLE)[0].text == text_llm.generate("some words", BABBLE)[0].text


def test_what_cannot_be_done_is_said(text_llm):
    llm = LLM(tiny_model())
    for prompts, params, message in (
        ([[]], None, "prompt 0 is empty"),
        ([[1], [0] * 512], None, "prompt 1 has 512 tokens, but the model has 512 positions"),
        ([[1, 160]], None, "holds id 160, but the model's ids are 0 to 159"),
        ("text", None, "no tokenizer"),
        ([[1]], SamplingParams(stop=("x",)), "stop_token_ids"),
        ([[1], [2]], [GREEDY], "2 prompts came with 1 SamplingParams"),
        ([1, 2], None, "prompt 0 is a int"),
    ):
        with pytest.raises(UserError, match=message):
            llm.generate(prompts, params)
    with pytest.raises(UserError, match="no tokenizer"):
        llm.stream([1])
    with pytest.raises(UserError, match="is empty"):
        llm.score([])
    with pytest.raises(UserError, match="not of the same checkpoint"):
        LLM(tiny_model(), text_llm.tokenizer)
