"""Anthropic's Messages API on the stub: prompts, replies, the sequence of events, errors, and what clients send."""

import json
from contextlib import closing
from http.client import HTTPConnection

import pytest
from server_thread import connect, running, wait_until

from openmimo.engine.server.backends.stub import Step, StubBackend, echo

MESSAGES, COUNT, CHAT = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
CHAT_WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA},
}
TIME = {"name": "get_time", "input_schema": {"type": "object"}}
ARGUMENTS = "<parameter=city>Oslo</parameter>\n</function>\n</tool_call>"
CALL = "<tool_call>\n<function=get_weather>\n" + ARGUMENTS
HELLO = [{"role": "user", "content": "hello there"}]


def script(prompt, request):
    question = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    if prompt.endswith("<function=get_weather>\n"):
        text = ARGUMENTS
    elif "weather" in question and "<tool_response>" not in question:
        text = "<think>Look it up.</think>Looking.\n" + CALL + CALL
    elif "cut" in question:
        text = "<think>Well.</think>" + CALL[: CALL.index("slo</")]
    elif "break" in question:
        yield Step(("It ",))
        yield Step((), error="out of pages")
        return
    else:
        yield from echo(prompt, request)
        return
    for start in range(0, len(text), 5):
        yield Step((text[start : start + 2], text[start + 2 : start + 5]))


def endless(prompt, request):
    while True:
        yield Step((" word",))


@pytest.fixture(scope="module")
def backend():
    return StubBackend(script, max_positions=20_000)


@pytest.fixture(scope="module")
def client(backend):
    with running(backend) as server, connect(server) as client:
        yield client


def body_of(messages, **fields):
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return {"model": "stub", "max_tokens": 500, "messages": turns, **fields}


def created(client, messages, **fields):
    response = client.post(MESSAGES, json=body_of(messages, **fields))
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client, messages, **fields):
    """The events of a reply, after a look at their names."""
    response = client.post(MESSAGES, json=body_of(messages, stream=True, **fields))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def prompt_of(backend):
    return backend.tokenizer.decode(backend.requests[-1].prompt_token_ids, skip_special=False)


# --- replies ----------------------------------------------------------------------------------------------------------


def test_a_message(client, backend):
    message = created(client, "hello there")
    usage = message.pop("usage")
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "stub",
        "content": [{"type": "text", "text": "hello there"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert usage["input_tokens"] == len(backend.requests[-1].prompt_token_ids) and usage["output_tokens"] > 0


def test_the_events_of_a_message_come_in_order(client):
    events = streamed(client, "weather?", tools=[WEATHER], thinking={"type": "enabled", "budget_tokens": 1024})
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["output_tokens"] == 0
    inside = [event for event in events if event["type"].startswith("content_block")]
    blocks, deltas = [], []
    for event in inside:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"]["type"])
                deltas.append([])
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                deltas[-1].append(event["delta"]["type"])
            case "content_block_stop":
                assert event["index"] == len(blocks) - 1
    assert blocks == ["thinking", "text", "tool_use", "tool_use"]
    assert deltas[0][-1] == "signature_delta" and set(deltas[0][:-1]) == {"thinking_delta"}
    assert set(deltas[1]) == {"text_delta"} and set(deltas[2]) == set(deltas[3]) == {"input_json_delta"}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] > 0


def accumulated(events):
    """The content that a client builds from events, as Anthropic's documentation says."""
    blocks, texts = [], {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta = {**event["delta"]}
            kind = delta.pop("type")
            if kind == "input_json_delta":
                texts[event["index"]] = texts.get(event["index"], "") + delta["partial_json"]
            else:
                for name, text in delta.items():
                    blocks[event["index"]][name] += text
    for index, text in texts.items():
        blocks[index]["input"] = json.loads(text)
    return blocks


@pytest.mark.parametrize("question", ["hello there", "weather?"])
def test_a_stream_adds_up_to_the_whole_message(client, question):
    def without_ids(blocks):
        return [{name: value for name, value in block.items() if name != "id"} for block in blocks]

    whole = created(client, question, tools=[WEATHER])
    events = streamed(client, question, tools=[WEATHER])
    assert without_ids(accumulated(events)) == without_ids(whole["content"])
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"] and events[-2]["usage"] == whole["usage"]


def test_why_a_reply_stopped(client):
    assert created(client, "one two three", max_tokens=1)["stop_reason"] == "max_tokens"
    stopped = created(client, "one two three four", stop_sequences=["never", " three", " four"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " three")
    assert stopped["content"] == [{"type": "text", "text": "one two"}]
    events = streamed(client, "one two three", stop_sequences=[" three"])
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": " three"}
    with running(StubBackend(endless, max_positions=200)) as server, connect(server) as small:
        assert created(small, "x")["stop_reason"] == "model_context_window_exceeded"


def test_a_call_that_is_cut_off_is_returned_and_taken_back(client):
    for tools in ([], [WEATHER]):
        message = created(client, "cut", tools=tools)
        assert message["stop_reason"] == "end_turn"
        assert [block["type"] for block in message["content"]] == ["thinking", "tool_use"]
        assert isinstance(message["content"][1]["input"], dict)
        reply = {"role": "assistant", "content": message["content"]}
        created(client, [*HELLO, reply, {"role": "user", "content": "go on"}])


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_prompt_is_that_of_the_same_chat(client, backend):
    chat = [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "What is the weather in Oslo?\n\nAnd the time?"},
        {
            "role": "assistant",
            "reasoning_content": "Look it up.",
            "content": "Looking.",
            "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "user", "content": "Well?"},
    ]
    body = {"messages": chat, "tools": [CHAT_WEATHER], "chat_template_kwargs": {"enable_thinking": True}}
    assert client.post(CHAT, json=body).status_code == 200
    expected = prompt_of(backend)
    cached = {"cache_control": {"type": "ephemeral"}}
    turns = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is the weather in Oslo?"},
                {"type": "text", "text": "And the time?", **cached},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Look it up.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "1", "name": "get_weather", "input": {"city": "Oslo"}, "caller": None},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "rain"}], **cached},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=2;"},
        {"type": "text", "text": "Be brief."},
        {"type": "text", "text": "Be kind.", **cached},
    ]
    given = {"system": system, "tools": [{**WEATHER, **cached}], "thinking": {"type": "adaptive"}}
    created(client, turns, **given)
    assert prompt_of(backend) == expected
    counted = client.post(COUNT, json={"model": "stub", "messages": turns, **given}).json()
    assert counted == {"input_tokens": len(backend.requests[-1].prompt_token_ids)}


def test_the_reply_continues_a_last_turn_of_the_assistant(client, backend):
    turns = [*HELLO, {"role": "assistant", "content": "The best answer is ("}]
    body = {"messages": turns, "continue_final_message": True}
    assert client.post(CHAT, json=body).status_code == 200
    expected = prompt_of(backend)
    created(client, turns)
    assert prompt_of(backend) == expected and expected.endswith("The best answer is (")


def test_documents_of_text_are_read(client, backend):
    source = {"type": "text", "media_type": "text/plain", "data": "The sky is green."}
    document = {"type": "document", "source": source, "title": "Skies", "citations": {"enabled": False}}
    created(client, [{"role": "user", "content": [document, {"type": "text", "text": "Which color?"}]}])
    assert "Skies\n\nThe sky is green.\n\nWhich color?" in prompt_of(backend)


@pytest.mark.parametrize(
    ("thinking", "thinks"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "between_tools"}, False),
        ({"type": "enabled", "budget_tokens": 2000}, True),
        ({"type": "adaptive", "display": "summarized"}, True),
    ],
)
def test_thinking_is_on_or_off(client, backend, thinking, thinks):
    chat = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": thinks}}
    assert client.post(CHAT, json=chat).status_code == 200
    expected = prompt_of(backend)
    created(client, HELLO, **({"thinking": thinking} if thinking else {}))
    assert prompt_of(backend) == expected


def test_tool_choices(client, backend):
    tools = [WEATHER, TIME]
    created(client, "hello", tools=tools, tool_choice={"type": "none"})
    assert "get_weather" not in prompt_of(backend)
    forced = created(client, "hello", tools=tools, tool_choice={"type": "tool", "name": "get_weather"})
    assert [block["type"] for block in forced["content"]] == ["tool_use"] and forced["stop_reason"] == "tool_use"
    assert forced["content"][0]["input"] == {"city": "Oslo"}
    created(client, "hello", tools=tools, tool_choice={"type": "any"})
    assert prompt_of(backend).endswith("<tool_call>\n<function=")
    single = {"type": "auto", "disable_parallel_tool_use": True}
    one = created(client, "weather?", tools=tools, tool_choice=single)
    assert [block["type"] for block in one["content"]].count("tool_use") == 1


def test_sampling_fields_reach_the_engine(client, backend):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    config = {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    created(client, "x", temperature=0.5, top_p=0.9, top_k=7, max_tokens=3, output_config=config)
    params = backend.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 7, 3)
    assert params.structure.kind == "json_schema" and json.loads(params.structure.source) == schema
    created(client, "x", max_tokens=10**6)
    assert backend.requests[-1].params.max_tokens == 32768
    assert backend.requests[-1].params.temperature == 1.0


def test_what_claude_code_sends(client, backend):
    body = body_of(
        [
            {"role": "user", "content": [{"type": "text", "text": "<system-reminder>\n</system-reminder>"}]},
            {"role": "system", "content": "Available agent types: none."},
        ],
        tools=[{**WEATHER, "name": f"tool_{number}"} for number in range(40)],
        metadata={"user_id": '{"device_id": "x", "session_id": "y"}'},
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        stream=True,
    )
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219", "x-api-key": "any"}
    response = client.post(f"{MESSAGES}?beta=true", json=body, headers=headers)
    assert response.status_code == 200 and response.text.count("event: message_stop") == 1
    assert "Available agent types: none." in prompt_of(backend) and "tool_39" in prompt_of(backend)


def test_tools_of_anthropic_are_skipped_with_a_warning(client, backend):
    call = {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {"query": "x"}}
    result = {"type": "web_search_tool_result", "tool_use_id": "1", "content": []}
    turns = [*HELLO, {"role": "assistant", "content": [call, result, {"type": "text", "text": "Found."}]}, *HELLO]
    body = body_of(turns, tools=[{"type": "web_search_20260209", "name": "web_search", "max_uses": 3}, WEATHER])
    response = client.post(MESSAGES, json=body)
    assert response.status_code == 200
    warning = response.headers["x-openmimo-warning"]
    parts = "tools[0]: web_search_20260209", "[1].content[0]: server_tool_use", "[1].content[1]: web_search_tool_result"
    assert all(part in warning for part in parts)
    assert "web_search" not in prompt_of(backend) and "Found." in prompt_of(backend)


# --- errors -----------------------------------------------------------------------------------------------------------


def error_of(response):
    """The error of a response, after a look at its shape."""
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["request_id"] == response.headers["request-id"]
    return body["error"]


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}}
BAD = {
    "messages": {"messages": []},
    "messages[0].content": {"messages": [{"role": "user"}]},
    "messages[0].role": {"messages": [{"role": "tool", "content": "x"}]},
    "messages[0].content[0]: this endpoint reads text only; image": {
        "messages": [{"role": "user", "content": [IMAGE]}]
    },
    "messages[0].content[0].content[0]": {
        "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}]}]
    },
    "messages contain no text": {"messages": [{"role": "user", "content": []}]},
    "messages[0]: a turn of the role user has no tool_use": {
        "messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]
    },
    "messages[0].content[0].type": {"messages": [{"role": "user", "content": [{"type": "no type"}]}]},
    "max_tokens": {"max_tokens": 0},
    "temperature": {"temperature": 1.5},
    "tools[0].input_schema": {"tools": [{"name": "f"}]},
    "tools[0].name": {"tools": [{"name": "f g", "input_schema": {}}]},
    "tool_choice": {"tools": [WEATHER], "tool_choice": {"type": "tool"}},
    "tool_choice names the function 'g'": {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}},
    "thinking.type": {"thinking": {"type": "yes"}},
    "stop_sequences[0]": {"stop_sequences": [""]},
    "system": {"system": 3},
}


@pytest.mark.parametrize(("part", "change"), BAD.items(), ids=BAD)
def test_errors_say_what_is_wrong_in_anthropics_format(client, part, change):
    response = client.post(MESSAGES, json={**body_of(HELLO), **change})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error" and part in error["message"]


def test_missing_fields_are_named(client):
    for name in ("model", "max_tokens", "messages"):
        body = body_of(HELLO)
        del body[name]
        assert error_of(client.post(MESSAGES, json=body))["message"] == f"{name} is missing."


def test_errors_of_the_server_have_anthropics_format(client):
    unknown = client.post(MESSAGES, json={**body_of(HELLO), "model": "other"})
    assert unknown.status_code == 404 and error_of(unknown)["type"] == "not_found_error"
    assert error_of(client.get(MESSAGES))["type"] == "not_found_error"
    assert error_of(client.post(MESSAGES, content=b"{", headers={"content-type": "application/json"}))
    broken = client.post(MESSAGES, json=body_of("break"))
    assert broken.status_code == 500 and error_of(broken)["type"] == "api_error"
    events = streamed(client, "break")
    assert events[-1]["type"] == "error" and events[-1]["error"]["type"] == "api_error"
    assert "out of pages" in events[-1]["error"]["message"]
    other = client.post("/v1/messages_of_others", json={})
    assert other.status_code == 404 and set(other.json()) == {"error"}


def test_keys_and_sizes():
    settings = {"api_key": "secret", "max_body_bytes": 10_000}
    with running(StubBackend(), **settings) as server, connect(server) as client:
        for headers, status in (({}, 401), ({"x-api-key": "no"}, 401), ({"x-api-key": "secret"}, 200)):
            assert client.post(MESSAGES, json=body_of(HELLO), headers=headers).status_code == status
        assert error_of(client.post(MESSAGES, json=body_of(HELLO)))["type"] == "authentication_error"
        bearer = {"authorization": "Bearer secret"}
        assert client.post(MESSAGES, json=body_of(HELLO), headers=bearer).status_code == 200
        large = client.post(MESSAGES, json=body_of("x" * 20_000), headers=bearer)
        assert large.status_code == 413 and error_of(large)["type"] == "request_too_large"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request(stream):
    backend = StubBackend(endless, step_seconds=0.005)
    body = json.dumps(body_of(HELLO, stream=stream, max_tokens=4000))
    with running(backend) as server:
        with closing(HTTPConnection(*server.url.removeprefix("http://").split(":"))) as client:
            client.request("POST", MESSAGES, body, {"Content-Type": "application/json"})
            if stream:
                with client.getresponse() as response:
                    assert response.readline() == b"event: message_start\n"
            wait_until(lambda: backend.running)
        wait_until(lambda: not backend.running)
    assert len(backend.requests) == 1
