"""An engine on several ranks generates what an engine on one device generates."""

import multiprocessing
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_config
from distributed.forked_ranks import forked_member, forked_team
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.records import Request, SamplingParams, Structure
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.model.embedded import EMBEDDED
from openmimo.model.hf import load_model, save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import mimo_7b, tiny_alibi, tiny_fairy, tiny_hysparse
from openmimo.parallel.inference import text_logprobs

SMALL = EngineConfig(max_sequences=4, prefill_tokens=64, mixed_prefill_tokens=32, adaptive_drafts=False)
LAYOUTS = [(2, False), (2, True), (4, False), (4, True)]  # four ranks: more than key/value heads of full layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("ranks") / "model")


def ids(count, seed=0):
    return tuple(torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def requests() -> list[Request]:
    """One request for each thing that a step may carry. The first and the last have a common beginning."""
    stem, greedy = ids(50, 1), SamplingParams(max_tokens=14, temperature=0.0)
    sampled = SamplingParams(max_tokens=14, temperature=0.9, seed=5)
    return [
        Request("greedy", stem + ids(20, 2), replace(greedy, logprobs=True, top_logprobs=3)),
        Request("filters", ids(3, 4), replace(sampled, top_p=0.8, top_k=30, min_p=0.01, logprobs=True)),
        Request("penalties", ids(9, 5), replace(sampled, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=6)),
        Request("bias", ids(4, 6), replace(greedy, logit_bias={7: 3.0, 11: -2.0}, stop_token_ids=(9,))),
        Request("form", ids(6, 7), replace(sampled, max_tokens=24, structure=Structure("regex", "[a-c]{4,9}!"))),
        Request("prompt", ids(40, 8), replace(greedy, max_tokens=2, prompt_logprobs=True, prompt_top_logprobs=2)),
        Request("embedding", ids(33, 9), replace(greedy, max_tokens=1, pooling="mean")),
        Request("experts", ids(21, 10), replace(sampled, routed_experts=True)),
        Request("turn", ids(30, 11), replace(greedy, routed_experts=True), session="talk"),
        Request("long", ids(150, 12), replace(greedy, max_tokens=40)),
        Request("same beginning", stem + ids(5, 3), sampled),
    ]


def run(engine, wanted):
    sequences = [engine.submit(request) for request in wanted]
    while engine.has_work:
        engine.step()
    return [sequence.completion() for sequence in sequences]


def next_turn(first):
    return Request(
        "next turn",
        (*first.prompt_token_ids, *first.token_ids, *ids(5, 13)),
        SamplingParams(max_tokens=9, temperature=0.0, routed_experts=True),
        session="talk",
    )


def generated(engine):
    """The requests at once, a further turn, and all of it again after new weights."""
    found = run(engine, requests())
    found += run(engine, [next_turn(found[8])])
    config = tiny_config(num_layers=2, mtp_heads=3)
    config = replace(config, vocab_size=engine.model.config.vocab_size, max_positions=4096)
    new = randomize(MiMo(config), 1).to(torch.float64).state_dict()
    engine.update_weights(new, version=3)
    return found + run(engine, requests())


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.finish_reason, one.error) == (other.finish_reason, other.error)
        assert one.policy_versions == other.policy_versions
        for name in ("logprobs", "prompt_logprobs", "embedding"):
            assert getattr(one, name) == (getattr(other, name) and pytest.approx(getattr(other, name), abs=1e-6)), name
        for name in ("top_logprobs", "prompt_top_logprobs"):
            assert likeliest(getattr(one, name)) == likeliest(getattr(other, name)), name
        assert (one.routed_experts is None) == (other.routed_experts is None)
        if other.routed_experts is not None:
            np.testing.assert_array_equal(one.routed_experts, other.routed_experts)


def likeliest(positions):
    return positions and [[token for token, _ in entries] for entries in positions]


@pytest.fixture(scope="module")
def alone(checkpoint):
    return generated(Engine(load_model(checkpoint, dtype="float64"), Tokenizer.load(checkpoint), SMALL))


def test_short_texts_are_those_of_one_device(checkpoint):
    wanted = [
        replace(request, params=replace(request.params, max_tokens=4, min_tokens=0))
        for request in requests()
        if request.id in ("filters", "penalties", "prompt", "embedding", "experts")
    ]
    tokenizer, config = Tokenizer.load(checkpoint), replace(SMALL, max_sequences=16, tp=2)
    expected = run(Engine(load_model(checkpoint, dtype="float64"), tokenizer, SMALL), wanted)
    with forked_team(checkpoint, config) as team:
        assert_same(run(Engine(team.model, tokenizer, config, ranks=team), wanted), expected)


@pytest.mark.slow
@pytest.mark.parametrize("tp, ep", LAYOUTS)
def test_texts_are_those_of_one_device(checkpoint, alone, tp, ep):
    config = replace(SMALL, tp=tp, ep=ep)
    with forked_team(checkpoint, config) as team:
        engine = Engine(team.model, Tokenizer.load(checkpoint), config, ranks=team)
        found = generated(engine)
        assert_same(found, alone)
        assert found[10].num_cached_tokens > 0 and sum(engine.stats.offered) > 0
        assert engine.stats.report()["num_graphs"] == 0 and team.report()["num_ranks"] == tp


@pytest.mark.slow
def test_a_full_cache_preempts_and_changes_nothing(checkpoint, alone):
    config = replace(SMALL, tp=2, prefix_cache=False)
    with forked_team(checkpoint, config) as team:
        page_bytes = Engine(team.model, None, config, ranks=team).arena.page_bytes
        config = replace(config, cache_gigabytes=40.5 * page_bytes / 2**30)
        engine = Engine(team.model, Tokenizer.load(checkpoint), config, ranks=team)
        assert_same(run(engine, requests()), alone[: len(requests())])
        assert engine.scheduler.num_preemptions > 0


@pytest.mark.slow
def test_quantized_weights_are_parts_of_the_quantized_whole(checkpoint):
    alone = Engine(load_model(checkpoint, weights="int8", dtype="float64"), Tokenizer.load(checkpoint), SMALL)
    config = replace(SMALL, tp=2)
    with forked_team(checkpoint, config, weights="int8") as team:
        assert_same(generated(Engine(team.model, alone.tokenizer, config, ranks=team)), generated(alone))


@pytest.mark.slow
def test_drafts_of_a_trained_model_are_accepted():
    tokenizer, config = Tokenizer.load(EMBEDDED), replace(SMALL, tp=2)
    texts = ["sort 31524", "Once upon a time", "sort 9942"]
    prompts = [tuple(tokenizer.encode(text)) for text in texts]
    wanted = [
        Request(str(number), prompt, SamplingParams(max_tokens=40, temperature=0.4 * number, seed=2))
        for number, prompt in enumerate(prompts)
    ]
    alone = Engine(load_model(EMBEDDED, dtype="float64"), tokenizer, SMALL)
    with forked_team(EMBEDDED, config) as team:
        engine = Engine(team.model, tokenizer, config, ranks=team)
        assert_same(run(engine, wanted), run(alone, wanted))
        assert sum(engine.stats.accepted) > 0 and engine.stats.accepted == alone.stats.accepted


def small_mimo_7b():
    base = mimo_7b()
    full = replace(base.layers[0].attention, num_heads=4, num_kv_heads=2, key_dim=16, value_dim=16, rotary_dim=16)
    layers, mtp = (replace(base.layers[0], attention=full),) * 2, replace(base.mtp, attention=full)
    return replace(base, vocab_size=160, hidden_size=64, dense_ffn_dim=96, layers=layers, mtp=mtp)


def dense(config):
    return replace(config, layers=tuple(replace(layer, ffn="dense") for layer in config.layers), moe=None)


@pytest.mark.parametrize(
    "config, weights",
    [
        (replace(tiny_config(mtp_heads=1), vocab_size=161), "plain"),  # the last rank has fewer tokens
        (replace(tiny_config(), tie_embeddings=True), "int8"),
        (small_mimo_7b(), "plain"),  # biases, and another layout of checkpoints
    ],
)
def test_log_probabilities_of_a_text_are_those_of_one_device(tmp_path, config, weights):
    save_model(randomize(MiMo(config), 0), tmp_path / "model")
    tokens_T = torch.tensor([token % 161 % config.vocab_size for token in ids(100)])
    expected_T = text_logprobs(load_model(tmp_path / "model", weights=weights), tokens_T)
    options = {"dtype": "float32", "weights": weights}
    with forked_team(tmp_path / "model", replace(SMALL, tp=2), **options) as team:
        torch.testing.assert_close(team.text_logprobs(tokens_T), expected_T.detach(), atol=1e-5, rtol=0)


def test_an_llm_ends_with_a_rank_that_was_killed(checkpoint, monkeypatch):
    pids = []

    def noted_member():
        member = forked_member()
        pids.append(member.process.pid)
        return member

    monkeypatch.setattr("openmimo.engine.team.start_member", noted_member)
    llm = LLM(checkpoint, tp=2, device="cpu", max_sequences=2)
    weights = llm.stats()["weight_bytes_by_rank"]
    assert len(weights) == 2 and max(weights) < 0.8 * sum(p.nbytes for p in load_model(checkpoint).parameters())
    pieces = llm.stream("The quick", SamplingParams(max_tokens=4000, ignore_eos=True))
    next(pieces)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(UserError, match=r"rank 1 of 2 \(process \d+\) was ended by signal 9 \(SIGKILL\)"):
        list(pieces)
    with pytest.raises(UserError, match="rank 1 of 2"):
        llm.generate("The quick")
    llm.close()
    assert not multiprocessing.active_children()


def test_the_end_of_a_rank_is_noticed_without_a_step(checkpoint):
    noticed = threading.Event()
    with forked_team(checkpoint, replace(SMALL, tp=2)) as team:
        team.on_loss(noticed.set)
        multiprocessing.active_children()[0].kill()
        assert noticed.wait(30)
        assert team.loss.startswith("rank 1 of 2")


def test_a_rank_that_cannot_load_ends_all(checkpoint, tmp_path, monkeypatch):
    def killed_member():
        member = forked_member()
        member.process.kill()
        return member

    monkeypatch.setattr("openmimo.engine.team.start_member", killed_member)
    with pytest.raises(UserError, match="rank 1 of 2"):
        LLM(checkpoint, tp=2, device="cpu")
    assert not multiprocessing.active_children()


def saved(folder, config):
    save_model(MiMo(config), folder)
    return folder


@pytest.mark.parametrize(
    "options, config, message",
    [
        ({"tp": 3}, tiny_config(), "layer 0 has 8 heads"),
        ({"tp": 2, "ep": True}, dense(tiny_config()), "none"),
        ({"tp": 8, "ep": True}, replace(tiny_config(), moe=replace(tiny_config().moe, num_experts=4)), "4 experts"),
        ({"tp": 2, "weights": "fp8"}, tiny_config(), "'fp8'"),
        ({"tp": 2, "weights": "ternary"}, tiny_config(), "'ternary'"),
        ({"tp": 2}, tiny_fairy(), "complex"),
        ({"tp": 2}, tiny_hysparse(), "sparse"),
        ({"tp": 2}, tiny_alibi(), "alibi"),
        ({"ep": True}, tiny_config(), "tp is 1"),
        ({"tp": 2, "device": "cuda"}, tiny_config(), "no accelerator"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused_before_a_process_starts(tmp_path, monkeypatch, options, config, message):
    monkeypatch.delattr("openmimo.engine.team.start_member")
    with pytest.raises(ConfigError, match=message):
        LLM(saved(tmp_path / "model", config), **{"device": "cpu"} | options)


def test_a_model_in_memory_is_not_divided():
    with pytest.raises(ConfigError, match="tp is 2"):
        LLM(MiMo(tiny_config()), tp=2)
