"""The official anthropic client against the server: with the stub, and with the engine on a tiny random checkpoint."""

import json

import pytest
from server_thread import running
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.engine.server.backends.engine import EngineBackend
from openmimo.engine.server.backends.stub import Step, StubBackend
from openmimo.model.hf import load_model

anthropic = pytest.importorskip("anthropic", reason="needs the anthropic client")
pydantic = pytest.importorskip("pydantic")

KEY = "a key"
HELLO = [{"role": "user", "content": "Say hello."}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather of a city.", "input_schema": SCHEMA}
CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n</function>\n</tool_call>"


class Verdict(pydantic.BaseModel):
    """What structured replies are asked to be."""

    answer: bool


def script(prompt, request):
    """What the stub says: what was asked for, in pieces that cut through words and markup."""
    if request.params.structure is not None and request.params.structure.kind == "json_schema":
        text = '{"answer": true}'
    elif "weather" in prompt and "<tool_response>" not in prompt:
        text = "<think>I must look.</think>Looking. " + CALL
    elif "break down" in prompt:
        yield Step(("It ",))
        yield Step((), error="out of pages")
        return
    else:
        text = "Hello, 日本. " * 3
    for start in range(0, len(text), 5):
        yield Step((text[start : start + 2], text[start + 2 : start + 5]))


@pytest.fixture(scope="module", params=["stub", "engine"])
def server_url(request, tmp_path_factory):
    backend = StubBackend(script) if request.param == "stub" else engine_backend(tmp_path_factory.mktemp("tiny"))
    with running(backend, api_key=KEY) as server:
        yield server.url


def engine_backend(folder):
    save_tiny_checkpoint(folder)
    tokenizer = Tokenizer.load(folder)
    return EngineBackend(Engine(load_model(folder), tokenizer), tokenizer, model_name="tiny")


scripted = pytest.mark.parametrize("server_url", ["stub"], indirect=True)


@pytest.fixture(scope="module")
def client(server_url):
    with anthropic.Anthropic(base_url=server_url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def test_messages_whole_and_streamed(client, model):
    ask = {"model": model, "messages": HELLO, "max_tokens": 12, "system": "Be kind.", "extra_body": {"temperature": 0}}
    whole = client.messages.create(**ask)
    assert whole.stop_reason in ("end_turn", "max_tokens") and whole.usage.output_tokens <= 12
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in whole.content if block.type == "text")
    assert [block.type for block in final.content] == [block.type for block in whole.content]
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    assert stream.request_id.startswith("req_")


def test_a_stop_sequence_is_named(client, model):
    ask = {"model": model, "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0}}
    text = client.messages.create(**ask).content[0].text
    stop = text[3:5]
    stopped = client.messages.create(**ask, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in stopped.content) == text[: text.index(stop)]


def test_tokens_are_counted_as_they_are_billed(client, model):
    ask = {"model": model, "messages": HELLO, "tools": [WEATHER], "system": [{"type": "text", "text": "Be kind."}]}
    count = client.messages.count_tokens(**ask).input_tokens
    usage = client.messages.create(**ask, max_tokens=2).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == count


def test_a_call_that_must_come_comes(client, model):
    ask = {"model": model, "messages": HELLO, "tools": [WEATHER], "max_tokens": 100}
    named = {"type": "tool", "name": "get_weather"}
    for choice in (named, {"type": "any"}):
        message = client.messages.create(**ask, tool_choice=choice)
        assert message.content[0].type == "tool_use" and message.content[0].name == "get_weather"
    with client.messages.stream(**ask, tool_choice=named) as stream:
        assert stream.get_final_message().content[0].name == "get_weather"


def test_a_form(client, model):
    parsed = client.messages.parse(model=model, messages=HELLO, max_tokens=60, output_format=Verdict)
    assert parsed.parsed_output.answer in (True, False)


def test_errors_are_the_clients_own(client, model, server_url):
    with pytest.raises(anthropic.BadRequestError, match="temperature") as caught:
        client.messages.create(model=model, messages=HELLO, max_tokens=2, extra_body={"temperature": -1})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.request_id == caught.value.body["request_id"]
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="another", messages=HELLO, max_tokens=2)
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=server_url, api_key="wrong", max_retries=0).models.list()
    with anthropic.Anthropic(base_url=server_url, auth_token=KEY, max_retries=0) as other:
        assert other.models.retrieve(model).id == model


# --- what only a script can promise ----------------------------------------------------------------------------------


@scripted
def test_a_tool_call_with_thinking_is_answered_and_gone_on_from(client, model):
    question = {"role": "user", "content": "The weather in Oslo?"}
    ask = {
        "model": model,
        "tools": [WEATHER],
        "max_tokens": 2000,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    with client.messages.stream(**ask, messages=[question]) as stream:
        first = stream.get_final_message()
    thinking, text, call = first.content
    assert (thinking.thinking, text.text, call.input) == ("I must look.", "Looking. ", {"city": "Oslo"})
    assert thinking.signature and first.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "4 degrees"}]}
    turns = [question, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(**ask, messages=turns)
    assert second.content[0].text.startswith("Hello") and second.stop_reason == "end_turn"


@scripted
def test_the_clients_loop_runs_tools(client, model):
    asked = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: Name of the city.
        """
        asked.append(city)
        return json.dumps({"degrees": 4})

    question = [{"role": "user", "content": "The weather in Oslo?"}]
    runner = client.beta.messages.tool_runner(model=model, max_tokens=999, tools=[get_weather], messages=question)
    assert runner.until_done().content[0].text.startswith("Hello") and asked == ["Oslo"]


@scripted
def test_engine_errors_are_raised(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "break down"}], "max_tokens": 9}
    with pytest.raises(anthropic.InternalServerError, match="out of pages"):
        client.messages.create(**ask)
    pieces = []
    with pytest.raises(anthropic.APIStatusError, match="out of pages"), client.messages.stream(**ask) as stream:
        pieces.extend(stream.text_stream)
    assert "".join(pieces) == "It "
