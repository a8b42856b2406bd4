"""Speculation gives the tokens of plain decoding: greedy or sampled, with few or nearly all drafts accepted."""

import functools
from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config, tiny_model

from openmimo.core.errors import ConfigError
from openmimo.core.records import Request, SamplingParams
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.engine.worker import count_accepted
from openmimo.model.context import PackedContext
from openmimo.model.mimo import MiMo
from openmimo.model.moe import MoE

VOCAB = 160


@torch.no_grad()
def counting_model(heads, *, noise, num_layers=4, vocab_size=VOCAB):
    """A model (and heads) whose most likely token after t is t+1; `noise` is the weight of its layers' output."""
    model = randomize(MiMo(replace(tiny_config(mtp_heads=heads, num_layers=num_layers), vocab_size=vocab_size)), 0)
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)))
    model.lm_head.weight.copy_(embedding.roll(1, dims=0) / 8)
    for block in [*model.model.layers, *model.model.mtp.layers]:
        block.self_attn.o_proj.weight.mul_(noise)
        feed_forward = block.mlp.experts.down_proj if isinstance(block.mlp, MoE) else block.mlp.down_proj.weight
        feed_forward.mul_(noise)
    for block in model.model.mtp.layers:
        D = model.config.hidden_size
        block.eh_proj.weight.copy_(torch.cat([torch.eye(D), noise * block.eh_proj.weight[:, D:]], dim=1))
    return model


def _prompts(count=5, seed=0):
    """Ragged prompts, from one token to well above the window of 9."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 2, 7, 40, 23][:count]
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


MODELS = {
    "random": lambda: tiny_model(1, mtp_heads=3),
    "post_norm": lambda: randomize(
        MiMo(replace(tiny_config(mtp_heads=3), mtp=replace(tiny_config(mtp_heads=3).mtp, hidden="post_norm"))), 2
    ),
    "noisy": lambda: counting_model(3, noise=0.8),
    "sure": lambda: counting_model(3, noise=0.1),
}
PARAMS = {
    "greedy": [SamplingParams(max_tokens=count, temperature=0.0) for count in (30, 1, 2, 3, 22)],
    "sampled": [
        SamplingParams(max_tokens=25, temperature=1.0, seed=1),
        SamplingParams(max_tokens=2, temperature=0.8, seed=2),
        SamplingParams(max_tokens=20, temperature=0.7, top_p=0.9, top_k=30, seed=3),
        SamplingParams(max_tokens=30, temperature=0.3, seed=4, logprobs=True),
        SamplingParams(max_tokens=4, temperature=0.0),
    ],
}


@functools.cache
def _model_and_plain_texts(model, params):
    # In float32, rounding depends on the length of a pass, which changes a draw once in 10,000 tokens.
    model = MODELS[model]().to(torch.float64 if params == "sampled" else torch.float32)
    return model, LLM(model, speculative=False).generate(_prompts(), PARAMS[params])


@pytest.mark.parametrize("num_drafts", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("model", MODELS)
def test_speculation_changes_no_token(model, params, num_drafts):
    model, plain = _model_and_plain_texts(model, params)
    drafted = LLM(model, num_drafts=num_drafts, prefill_tokens=16, adaptive_drafts=False).generate(
        _prompts(), PARAMS[params]
    )
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert [c.finish_reason for c in drafted] == [c.finish_reason for c in plain]
    for mine, expected in zip(drafted, plain, strict=True):
        assert mine.logprobs == (None if expected.logprobs is None else pytest.approx(expected.logprobs, abs=1e-4))


@torch.inference_mode()
def _drafts_by_definition(model, texts, num_drafts):
    """Runs every head over all texts from their beginning, with the earlier heads' drafts as the missing tokens."""
    lengths = tuple(len(text) - 1 for text in texts)
    ends = torch.tensor(lengths).cumsum(0) - 1
    hidden = model(torch.tensor([token for text in texts for token in text[:-1]]), PackedContext(lengths))
    drafts = [[] for _ in texts]
    for head in range(num_drafts):
        shifted = [token for text, own in zip(texts, drafts, strict=True) for token in (text + own)[1 + head :]]
        states = model.mtp(head, hidden, torch.tensor(shifted), PackedContext(lengths))
        for own, token in zip(drafts, model.head(states[ends]).argmax(-1).tolist(), strict=True):
            own.append(token)
    return drafts


@pytest.mark.parametrize("num_drafts", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("model", MODELS)
def test_drafts_are_those_of_the_whole_sequence(model, num_drafts):
    """Fails if a draft comes from a row that an earlier draft left behind."""
    model = MODELS[model]().to(torch.float64)  # no two tokens are near enough for rounding to choose between
    engine = Engine(model, config=EngineConfig(num_drafts=num_drafts, prefill_tokens=11, adaptive_drafts=False))
    sequences = [
        engine.submit(Request(str(seed), tuple(prompt), SamplingParams(max_tokens=100, temperature=1.0, seed=seed)))
        for seed, prompt in enumerate(_prompts(4))
    ]
    runner, planned, num_compared = engine._runner, [], 0
    plan, execute = runner._decode_input, runner.worker.execute

    def decode_input(sequences, numbers):
        planned[:] = zip(sequences, numbers, strict=True)
        return plan(sequences, numbers)

    def compared(step):
        nonlocal num_compared
        output, first, tokens = execute(step), 0, step.main.token_ids_T.tolist()
        if not step.drafting:
            return output
        drafts = _drafts_by_definition(model, [sequence.tokens for sequence, _ in planned], num_drafts)
        for (_, number), expected in zip(planned, drafts, strict=True):
            assert tokens[first + 1 : first + 1 + number] == expected[:number]
            first, num_compared = first + 1 + number, num_compared + number
        return output

    runner._decode_input, runner.worker.execute = decode_input, compared
    for _ in range(25):
        engine.step()
    assert num_compared > 60 * num_drafts
    assert all(len(sequence.tokens) > sequence.prompt_length + 10 for sequence in sequences)


def test_the_distribution_is_the_models():
    """Chi-square over 2000 seeds of three tokens in a row, against the model's own probabilities of all 216 triples."""
    model = counting_model(2, noise=0.5, num_layers=2, vocab_size=6)
    prompt, count, temperature = [1, 4, 2], 2000, 3.0
    params = [SamplingParams(max_tokens=3, temperature=temperature, seed=seed) for seed in range(count)]
    llm = LLM(model, max_sequences=500, adaptive_drafts=False)
    tokens = torch.tensor([c.token_ids for c in llm.generate([prompt] * count, params)])
    assert llm.stats()["acceptance_by_head"][0] > 0.2
    observed = torch.bincount(tokens @ torch.tensor([36, 6, 1]), minlength=216).double()
    expected = torch.empty(216, dtype=torch.float64)
    with torch.no_grad():
        for path in range(216):
            ids = torch.tensor([*prompt, path // 36, path // 6 % 6, path % 6])
            logprobs = (model.logits(ids).double() / temperature).log_softmax(dim=-1)
            expected[path] = count * logprobs[2:5].gather(1, ids[3:, None]).sum().exp()
    likely = expected >= 5
    observed = torch.cat([observed[likely], observed[~likely].sum()[None]])
    expected = torch.cat([expected[likely], expected[~likely].sum()[None]])
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert freedom > 30
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_a_sure_model_needs_a_fraction_of_the_steps():
    params = SamplingParams(max_tokens=101, temperature=0.0)
    prompt = list(range(30))
    llm = LLM(counting_model(3, noise=0.05), adaptive_drafts=False)
    completion = llm.generate([prompt], params)[0]
    assert completion.token_ids == [(30 + offset) % VOCAB for offset in range(101)]
    stats = llm.stats()
    assert stats["num_steps"] == 25
    assert stats["accepted_tokens_per_step"] == 4.0
    assert stats["acceptance_by_head"] == [1.0, 1.0, 1.0]
    one_head = LLM(counting_model(3, noise=0.05), num_drafts=1, adaptive_drafts=False)
    one_head.generate([prompt], params)
    assert one_head.stats()["num_steps"] == 50
    assert one_head.stats()["cache_bytes"] < stats["cache_bytes"]


def test_statistics_count_what_happened():
    model = counting_model(2, noise=0.5)
    llm = LLM(model, adaptive_drafts=False)
    completions = llm.generate(_prompts(), SamplingParams(max_tokens=50, temperature=0.5, seed=1))
    stats = llm.stats()
    assert stats["num_new_tokens"] == sum(len(c.token_ids) for c in completions) == 250
    assert stats["num_prompt_tokens"] == 73
    assert 1.0 < stats["accepted_tokens_per_step"] < 3.0
    first, second = stats["acceptance_by_head"]
    assert 0.0 < first < 1.0 and 0.0 < second < 1.0
    # Three tokens where both drafts are right, two where the first is, else one; fewer where a sequence ends.
    assert stats["accepted_tokens_per_step"] == pytest.approx(1 + first + first * second, rel=0.05)
    assert stats["cache_bytes"] > 0 and stats["tokens_per_second"] > 0
    llm.reset_stats()
    assert llm.stats()["num_steps"] == 0


def test_count_accepted():
    """One pass over sequences with different numbers of drafts."""
    cases = [([], [5], 0), ([5, 6], [5, 6, 7], 2), ([5, 6], [4, 6, 7], 0), ([5, 6], [5, 9, 7], 1), ([7], [7, 1], 1)]
    input_tokens = [token for drafts, _, _ in cases for token in (5, *drafts)]
    decided = [token for _, tokens, _ in cases for token in tokens]
    rows = torch.tensor([[9, 9], [1, 2], [4, 5], [7, 8], [10, 11]])
    rows[0] = rows[4, 1] = len(input_tokens) - 1
    found = count_accepted(torch.tensor(input_tokens), torch.tensor(decided), rows)
    assert found.tolist() == [count for _, _, count in cases]


def test_settings_that_cannot_be_are_said():
    with pytest.raises(ConfigError, match="no MTP heads"):
        LLM(tiny_model(), speculative=True)
    with pytest.raises(ConfigError, match="1 to 2"):
        LLM(tiny_model(mtp_heads=2), num_drafts=3)
    with pytest.raises(ConfigError, match="no effect"):
        LLM(tiny_model(mtp_heads=2), speculative=False, num_drafts=1)
    assert LLM(tiny_model()).num_drafts == 0
    assert LLM(tiny_model(mtp_heads=2)).num_drafts == 2
    assert LLM(tiny_model(mtp_heads=2), speculative=False).num_drafts == 0
