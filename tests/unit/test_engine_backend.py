"""The engine behind the server's event loop: replies, aborts that free pages, refusals, and an engine that dies."""

import asyncio
import time
import warnings
from contextlib import aclosing
from dataclasses import replace

import pytest
from conftest import tiny_config, tiny_model
from server_thread import connect, running

from openmimo.core.errors import UserError
from openmimo.core.records import Request, SamplingParams, Structure
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.engine.server.backends.engine import EngineBackend
from openmimo.engine.stats import EngineStats
from openmimo.engine.structured import StructureCompiler
from openmimo.model.mimo import MiMo

TOKENIZER = Tokenizer.train(["some words"], vocab_size=270)
PROMPT = (5, 6, 7)
GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)


@pytest.fixture
def engine():
    return Engine(tiny_model(1, mtp_heads=2), config=EngineConfig(prefix_cache=False))


def with_backend(engine, work):
    """Runs `work(backend)` in an event loop, and closes the backend."""

    async def run():
        backend = EngineBackend(engine, TOKENIZER, model_name="tiny")
        try:
            return await asyncio.wait_for(work(backend), timeout=60)
        finally:
            await backend.close()

    return asyncio.run(run())


async def tokens_of(backend, request):
    async with aclosing(backend.generate(request)) as deltas:
        return [token async for delta in deltas for token in delta.token_ids]


def test_replies_side_by_side_are_those_of_the_engine_alone(engine):
    async def ask(backend):
        requests = [Request(str(number), (number, 6, 7), GREEDY) for number in range(5)]
        return await asyncio.gather(*(tokens_of(backend, request) for request in requests))

    expected = LLM(tiny_model(1, mtp_heads=2)).generate([[number, 6, 7] for number in range(5)], GREEDY)
    assert with_backend(engine, ask) == [completion.token_ids for completion in expected]


def test_a_reader_that_leaves_frees_its_pages_at_once(engine):
    async def leave(backend):
        long = Request("long", PROMPT, SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))
        async with aclosing(backend.generate(long)) as deltas:
            assert (await anext(deltas)).token_ids
            assert engine.arena.num_used > 0
        assert engine.arena.num_used == 0 and not engine.has_work
        return await tokens_of(backend, Request("next", PROMPT, GREEDY))

    assert len(with_backend(engine, leave)) == 30


def test_a_task_that_is_cancelled_before_it_hears_anything_leaves_nothing_behind(engine):
    async def cancel(backend):
        tasks = [asyncio.create_task(tokens_of(backend, Request(str(n), PROMPT, GREEDY))) for n in range(8)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return backend.gauges()

    gauges = with_backend(engine, cancel)
    assert (gauges.num_running, gauges.num_waiting, gauges.cache_bytes_used) == (0, 0, 0)


def test_what_the_engine_refuses_is_raised(engine):
    async def ask(backend):
        with pytest.raises(UserError, match="999"):
            backend.check(Request("1", (999,), GREEDY))
        with pytest.raises(UserError, match="999"):
            await tokens_of(backend, Request("1", (999,), GREEDY))
        return await tokens_of(backend, Request("1", PROMPT, GREEDY))

    assert len(with_backend(engine, ask)) == 30


def test_an_engine_that_dies_tells_its_clients_and_its_health(engine, monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    async def ask(backend):
        monkeypatch.setattr(engine, "step", fail)
        async with aclosing(backend.generate(Request("1", PROMPT, GREEDY))) as deltas:
            last = [delta async for delta in deltas][-1]
        async with aclosing(backend.generate(Request("2", PROMPT, GREEDY))) as deltas:
            late = [delta async for delta in deltas][-1]
        return last, late, backend.gauges().is_healthy

    last, late, is_healthy = with_backend(engine, ask)
    for delta in (last, late):
        assert delta.finish_reason == "error" and "log" in delta.error
    assert not is_healthy


def test_heads_that_are_right_by_chance_are_reported_once():
    stats = EngineStats.of_heads(1)
    with pytest.warns(UserWarning, match="no more than by chance"):
        for step in range(1000):
            stats.count_drafts(1, int(step % 100 == 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2000):
            stats.count_drafts(1, 0)
    good = EngineStats.of_heads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3000):
            good.count_drafts(1, int(step % 3 == 0))


BAD_FORMS = [
    ("/v1/completions", {"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ("/v1/completions", {"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
    ("/v1/completions", {"logit_bias": {"99999": 1}}, "logit_bias"),
    ("/v1/completions", {"stop_token_ids": [99999]}, "stop_token_ids"),
    ("/v1/completions", {"prompt": [99999]}, "prompt"),
    ("/v1/chat/completions", {"response_format": {
        "type": "json_schema", "json_schema": {"schema": {"type": "no type"}}}}, "response_format"),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": {"type": "no type"}}}}, "text.format"),
]  # fmt: skip


def test_what_the_engine_refuses_names_the_field_at_fault():
    tokenizer = Tokenizer.train(["some words"], vocab_size=300)
    model = MiMo(replace(tiny_config(), vocab_size=tokenizer.vocab_size, max_positions=512)).eval()
    backend = EngineBackend(Engine(model, tokenizer, EngineConfig(cache_gigabytes=0.01)), tokenizer, model_name="tiny")
    messages = [{"role": "user", "content": "x"}]
    prompts = {"/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"}}
    with running(backend) as server, connect(server) as client:
        for path, fields, param in BAD_FORMS:
            body = {**prompts.get(path, {"messages": messages}), **fields}
            response = client.post(path, json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_structures_are_checked_from_several_threads_at_once(monkeypatch):
    made = []
    make = StructureCompiler.__init__

    def slow_make(self, *arguments):
        made.append(self)
        time.sleep(0.05)
        make(self, *arguments)

    monkeypatch.setattr(StructureCompiler, "__init__", slow_make)
    tokenizer = Tokenizer.train(["some words"], vocab_size=300)
    model = MiMo(replace(tiny_config(), vocab_size=tokenizer.vocab_size)).eval()
    engine = Engine(model, tokenizer, EngineConfig(cache_gigabytes=0.01))

    async def check(backend):
        def one(number):
            pattern = "a(" if number % 5 == 4 else f"a{{{number % 5 + 1}}}"
            params = replace(GREEDY, ignore_eos=False, structure=Structure("regex", pattern))
            try:
                backend.check(Request(str(number), PROMPT, params))
            except UserError:
                return "refused"
            return "fine"

        return await asyncio.gather(*(asyncio.to_thread(one, number) for number in range(20)))

    assert with_backend(engine, check) == ["fine", "fine", "fine", "fine", "refused"] * 4
    assert len(made) == 1
