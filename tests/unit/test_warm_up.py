"""The server's warm-up: afterwards nothing is cached or counted, and a model that cannot generate is refused."""

import pytest
import torch
from conftest import tiny_model
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.core.errors import UserError
from openmimo.core.records import Request, SamplingParams
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.engine.server.serve import run_captured_sizes, warm_up
from openmimo.engine.step import PROMPTS, padded_shape, prompt_shape


@pytest.fixture
def llm(tmp_path):
    return LLM(save_tiny_checkpoint(tmp_path), max_sequences=12, prefill_tokens=256)


def test_a_warm_up_leaves_nothing_behind(llm):
    free = llm.engine.arena.num_used
    warm_up(llm.engine, llm.tokenizer)
    assert llm.engine.arena.num_used == free and not llm.engine.has_work
    assert llm.stats()["num_new_tokens"] == llm.stats()["num_prompt_tokens"] == 0


def test_a_model_that_cannot_generate_is_refused(llm):
    with torch.no_grad():
        llm.model.head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        warm_up(llm.engine, llm.tokenizer)


def test_the_warm_up_of_an_accelerator_reaches_every_captured_size(llm, monkeypatch):
    """On a CPU the same batches run; the sizes that they reach would be captured."""
    batches, prompts = set(), set()
    real = llm.engine._runner.decode, llm.engine._runner.prefill

    def decode(sequences, version):
        longest = max(sequence.num_computed_tokens + 1 for sequence in sequences)
        shape = padded_shape(len(sequences), 1, longest, max_sequences=12, max_positions=4096)
        batches.add((shape.num_sequences, shape.longest_key))
        return real[0](sequences, version)

    def prefill(prefills, version):
        assert len(prefills) <= PROMPTS
        shape = prompt_shape(
            len(prefills),
            sum(stop - sequence.num_computed_tokens for sequence, stop in prefills),
            max(stop for _, stop in prefills),
            max_positions=4096,
        )
        prompts.add(shape and shape.num_tokens)
        return real[1](prefills, version)

    monkeypatch.setattr(llm.engine._runner, "decode", decode)
    monkeypatch.setattr(llm.engine._runner, "prefill", prefill)
    run_captured_sizes(llm.engine)
    assert {count for count, _ in batches} == {1, 2, 4, 8, 12}
    assert {64, 128, 256} <= prompts
    assert not llm.engine.has_work


@pytest.mark.parametrize("captures_graphs", [True, False])
@pytest.mark.parametrize("captures", [True, False])
def test_graphs_are_captured_first_if_there_are_any_unless_declined(
    llm, captures, captures_graphs, monkeypatch, capsys
):
    ran = []
    monkeypatch.setattr(Engine, "captures_graphs", captures_graphs)
    monkeypatch.setattr("openmimo.engine.server.serve.run_captured_sizes", ran.append)
    warm_up(llm.engine, llm.tokenizer, captures=captures)
    assert ran == [llm.engine] * (captures and captures_graphs)
    assert ("--no-warm-up" in capsys.readouterr().out) == bool(ran)


def test_a_warm_up_teaches_nothing_about_drafts(llm):
    """Its texts are no language, so no head predicts them."""
    run_captured_sizes(llm.engine)
    learned = llm.engine._runner._draft_policy
    assert learned.chances([0], [0])[0, 0] < 0.9
    warm_up(llm.engine, llm.tokenizer)
    forgotten = llm.engine._runner._draft_policy
    assert forgotten is not learned
    assert forgotten.chances([0], [0])[0, 0] > learned.chances([0], [0])[0, 0]


def test_a_step_on_an_accelerator_reads_the_first_prompt_and_the_shortest():
    engine = Engine(tiny_model(1), config=EngineConfig(max_sequences=40, prefill_tokens=2000, cache_gigabytes=0.05))
    engine.scheduler._max_prompts = 4
    lengths = [150, 60, 50, 90, 20, 40, 30, 80]
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    states = [engine.submit(Request(str(n), tuple(range(3, 3 + length)), params)) for n, length in enumerate(lengths)]
    engine.step()
    assert [number for number, state in enumerate(states) if len(state.tokens) > lengths[number]] == [0, 4, 5, 6]
    while engine.has_work:
        engine.step()
    assert all(state.finish_reason == "length" for state in states)
