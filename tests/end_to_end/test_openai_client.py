"""The official openai client against the server: with the stub, and with the engine on a tiny random checkpoint."""

import json
from typing import Literal

import pytest
from server_thread import running, wait_until
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.engine.server.backends.engine import EngineBackend
from openmimo.engine.server.backends.stub import Step, StubBackend
from openmimo.model.hf import load_model

openai = pytest.importorskip("openai", reason="needs the openai client")
pydantic = pytest.importorskip("pydantic")

KEY = "a key"
HELLO = [{"role": "user", "content": "Say hello."}]
WEATHER_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER_SCHEMA}}
FLAT_WEATHER = {"type": "function", **WEATHER["function"]}
ARGUMENTS = "<parameter=city>Oslo</parameter>\n</function>\n</tool_call>"


class Verdict(pydantic.BaseModel):
    """The schema that structured replies must have."""

    answer: Literal["yes", "no"]


def script(prompt, request):
    """The stub's reply for a request, in pieces that split words and markup."""
    if request.params.structure is not None and request.params.structure.kind.startswith("json"):
        text = '{"answer": "yes"}'
    elif prompt.endswith("<function=get_weather>\n"):
        text = ARGUMENTS
    elif "weather" in prompt and "<tool_response>" not in prompt:
        text = "<think>I must look.</think>Looking. <tool_call>\n<function=get_weather>\n" + ARGUMENTS
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
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


# --- what any backend must do ----------------------------------------------------------------------------------------


def test_models(client, model):
    assert client.models.retrieve(model).id == model


def test_completions_whole_and_streamed(client, model):
    ask = {
        "model": model,
        "prompt": "Once upon",
        "max_tokens": 12,
        "n": 2,
        "seed": 5,
        "temperature": 0.8,
        "logprobs": 2,
    }
    whole = client.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    texts = ["", ""]
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert all(len(top) <= 3 for top in logprobs.top_logprobs) and max(logprobs.token_logprobs) <= 0
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert token in top  # the chosen token is listed even if it is not one of the likeliest


def test_token_ids_are_prompts_and_are_echoed(client, model):
    whole = client.completions.create(
        model=model, prompt=[[65, 66], [67]], max_tokens=3, echo=True, logprobs=0, extra_body={"ignore_eos": True}
    )
    assert [choice.logprobs.token_logprobs[0] for choice in whole.choices] == [None, None]
    assert len(whole.choices[0].logprobs.tokens) == 2 + 3
    assert whole.usage.prompt_tokens == 3


def test_chat_whole_and_streamed(client, model):
    ask = {"model": model, "messages": HELLO, "max_tokens": 12, "n": 2, "seed": 5, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**ask)
    assert all(choice.message.role == "assistant" for choice in whole.choices)
    assert all(choice.finish_reason in ("stop", "length", "tool_calls") for choice in whole.choices)
    texts, reasons, counts = ["", ""], [None, None], [0, 0]
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            counts[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
        usage = chunk.usage
    assert texts == [choice.message.content or "" for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert sum(counts) == usage.completion_tokens == whole.usage.completion_tokens
    assert counts[0] == len(whole.choices[0].logprobs.content)
    first = whole.choices[0].logprobs.content[0]
    assert bytes(first.bytes).decode(errors="replace") == first.token and len(first.top_logprobs) == 1


def test_a_stop_string_ends_the_text_without_it(client, model):
    ask = {"model": model, "messages": HELLO, "max_tokens": 12, "seed": 1}
    text = client.chat.completions.create(**ask).choices[0].message.content
    stop = text[3:5]
    stopped = client.chat.completions.create(**ask, stop=[stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


@scripted
def test_without_tool_choice_a_call_is_text(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "weather?"}], "tools": [WEATHER]}
    choice = client.chat.completions.create(**ask, tool_choice="none").choices[0]
    assert choice.message.tool_calls is None and "<function=get_weather>" in choice.message.content
    assert choice.finish_reason == "stop"


@scripted
def test_a_call_cut_off_is_no_reason_to_run_tools(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "weather?"}], "tools": [WEATHER]}
    choice = client.chat.completions.create(**ask, stop=["</parameter>"]).choices[0]
    assert choice.finish_reason == "stop"


def test_a_call_that_must_come_comes(client, model):
    named = {"type": "function", "function": {"name": "get_weather"}}
    ask = {"model": model, "messages": HELLO, "tools": [WEATHER], "max_tokens": 100, "seed": 1}
    for choice in (named, "required"):
        calls = client.chat.completions.create(**ask, tool_choice=choice).choices[0].message.tool_calls
        assert calls[0].function.name == "get_weather" and calls[0].id
    chunks = client.chat.completions.create(**ask, tool_choice=named, stream=True)
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert [call.function.name for call in deltas if call.function.name] == ["get_weather"]


def test_json_schema(client, model):
    parsed = client.chat.completions.parse(model=model, messages=HELLO, response_format=Verdict, max_tokens=60, seed=1)
    assert parsed.choices[0].message.parsed.answer in ("yes", "no")
    response = client.responses.parse(model=model, input="Is it?", text_format=Verdict, max_output_tokens=60)
    assert response.output_parsed.answer in ("yes", "no")


def test_responses_whole_and_streamed(client, model):
    ask = {"model": model, "input": "Say hello.", "instructions": "Be kind.", "max_output_tokens": 12}
    ask["extra_body"] = {"seed": 5}
    whole = client.responses.create(**ask)
    assert whole.status in ("completed", "incomplete") and whole.usage.output_tokens <= 12
    events = list(client.responses.create(**ask, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:3]] == [
        "response.created", "response.in_progress", "response.output_item.added",
    ]  # fmt: skip
    assert events[-1].type == f"response.{whole.status}"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text


def test_a_conversation_in_responses_goes_on(client, model):
    first = client.responses.create(model=model, input="Hello.", max_output_tokens=8)
    turns = [{"role": "user", "content": "Hello."}, *[item.model_dump() for item in first.output]]
    second = client.responses.create(
        model=model, input=[*turns, {"role": "user", "content": "Go on."}], max_output_tokens=8
    )
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


def test_errors_are_the_clients_own(client, model, server_url):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="another", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(model=model, input="x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server_url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=model, input="x", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def test_embeddings(client, model):
    # Without encoding_format the client asks for base64 and decodes it.
    vectors = [entry.embedding for entry in client.embeddings.create(model=model, input=["x y", "z"]).data]
    plain = client.embeddings.create(model=model, input=["x y", "z"], encoding_format="float")
    for vector, entry in zip(vectors, plain.data, strict=True):
        assert vector == pytest.approx(entry.embedding, abs=1e-6)
        assert sum(value**2 for value in entry.embedding) == pytest.approx(1.0)


# --- what needs scripted replies -------------------------------------------------------------------------------------


@scripted
def test_a_tool_call_is_streamed_answered_and_gone_on_from(client, model):
    question = [{"role": "user", "content": "The weather in Oslo?"}]
    ask = {"model": model, "messages": question, "tools": [WEATHER]}
    message = client.chat.completions.create(**ask).choices[0].message
    assert (message.content, message.reasoning_content) == ("Looking. ", "I must look.")
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    with client.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "4 degrees"}
    answer = client.chat.completions.create(**{**ask, "messages": [*question, message, result]})
    assert answer.choices[0].message.content.startswith("Hello") and answer.choices[0].finish_reason == "stop"


@scripted
def test_a_function_call_in_responses(client, model):
    question = {"role": "user", "content": "The weather in Oslo?"}
    ask = {"model": model, "tools": [FLAT_WEATHER]}
    first = client.responses.create(**ask, input=[question])
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    reasoning, text, call = first.output
    assert reasoning.content[0].text == "I must look." and text.content[0].text == "Looking. "
    assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Oslo"}
    with client.responses.stream(**ask, input=[question]) as stream:
        arguments = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
        assert json.loads(arguments) == {"city": "Oslo"}
        assert [item.type for item in stream.get_final_response().output] == ["reasoning", "message", "function_call"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "4 degrees"}
    second = client.responses.create(**ask, input=[question, *[item.model_dump() for item in first.output], output])
    assert second.output_text.startswith("Hello") and second.status == "completed"


@scripted
def test_a_reply_cut_short_in_responses_is_incomplete(client, model):
    response = client.responses.create(model=model, input="Say hello.", max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"


@scripted
def test_engine_errors_are_raised(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "break down"}]}
    with pytest.raises(openai.InternalServerError, match="out of pages"):
        client.chat.completions.create(**ask)
    pieces = []
    with pytest.raises(openai.APIError, match="out of pages"):
        for chunk in client.chat.completions.create(**ask, stream=True):
            pieces.append(chunk.choices[0].delta.content)
    assert "".join(pieces) == "It "
    with pytest.raises(openai.APIError, match="out of pages"):
        list(client.responses.create(model=model, input="break down", stream=True))


def test_a_full_queue_is_a_rate_limit():
    backend = StubBackend(lambda prompt, request: [Step((" word",))] * 3000, slots=1, step_seconds=0.01)
    with running(backend, max_queue=1) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ask = {"model": "stub", "messages": HELLO}
        with client.chat.completions.create(**ask, stream=True) as running_one:
            next(running_one)
            wait_until(lambda: server.config.app.state.service.num_waiting == 0)
            with client.chat.completions.create(**ask, stream=True), pytest.raises(openai.RateLimitError):
                client.chat.completions.create(**ask)
        client.close()
