"""The Responses API on the stub: stored responses, compaction, the WebSocket transport, and what clients send."""

import json

import httpx
import pytest
from server_thread import connect, running
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from openmimo.engine.server.app import create_app
from openmimo.engine.server.backends.stub import Step, StubBackend, echo
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.server.openai.responses import socket as socket_module
from openmimo.engine.server.openai.responses.store import ResponseStore, StoredResponse

RESPONSES, COMPACT, SOCKET = "/v1/responses", "/v1/responses/compact", "ws://localhost/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n</function>\n</tool_call>"


def script(prompt, request):
    """Think and call if the last turn says so; otherwise repeat it."""
    last = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    if "<tool_response>" not in last and "weather" in last and "get_weather" in prompt:
        thought = "<think>Look it up.</think>" if "think" in last else ""
        return [Step((thought + CALL,))]
    return echo(prompt, request)


@pytest.fixture(scope="module")
def backend():
    return StubBackend(script)


@pytest.fixture(scope="module")
def client(backend):
    with running(backend) as server, connect(server) as client:
        yield client


def created(client, **body):
    response = client.post(RESPONSES, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(backend):
    return backend.tokenizer.decode(backend.requests[-1].prompt_token_ids, skip_special=False)


def text_of(response):
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


# --- stored responses -------------------------------------------------------------------------------------------------


def test_a_response_is_continued_retrieved_listed_and_deleted(client, backend):
    first = created(client, input="My name is Alice.", instructions="Be brief.")
    assert first["store"] is True and first["previous_response_id"] is None
    second = created(client, input="And mine is Bob.", previous_response_id=first["id"], stream=False)
    assert second["previous_response_id"] == first["id"]
    prompt = prompt_of(backend)
    turns = ["user\nMy name is Alice.", "assistant\n", "user\nAnd mine is Bob."]
    positions = [prompt.index(turn) for turn in turns]
    assert positions == sorted(positions) and prompt.count("My name is Alice.") == 2  # the question and its echo
    assert "Be brief." not in prompt  # as OpenAI says: instructions are of one response

    assert client.get(f"{RESPONSES}/{second['id']}").json() == second
    items = client.get(f"{RESPONSES}/{second['id']}/input_items").json()
    assert [item["content"][0]["text"] for item in items["data"]] == ["And mine is Bob."]
    assert items["first_id"] == items["last_id"] == items["data"][0]["id"] and items["has_more"] is False

    deleted = client.delete(f"{RESPONSES}/{first['id']}").json()
    assert deleted == {"id": first["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        assert client.request(method, f"{RESPONSES}/{first['id']}").status_code == 404
    error = client.post(RESPONSES, json={"input": "x", "previous_response_id": first["id"]})
    assert (error.status_code, error.json()["error"]["code"]) == (400, "previous_response_not_found")
    third = created(client, input="Who are we?", previous_response_id=second["id"])
    assert "My name is Alice." in prompt_of(backend) and third["status"] == "completed"


def test_input_items_come_in_pages(client):
    items = [{"role": "user", "content": str(number)} for number in range(5)]
    url = f"{RESPONSES}/{created(client, input=items)['id']}/input_items"
    texts, after = [], None
    for _ in range(3):
        page = client.get(url, params={"limit": 2, "order": "asc", **({"after": after} if after else {})}).json()
        texts += [item["content"][0]["text"] for item in page["data"]]
        after = page["last_id"]
    assert texts == ["0", "1", "2", "3", "4"] and page["has_more"] is False
    for params in ({"limit": 0}, {"limit": "x"}, {"order": "up"}):
        error = client.get(url, params=params)
        assert error.status_code == 400 and error.json()["error"]["param"] == next(iter(params))
    newest = client.get(url, params={"limit": 1}).json()
    assert newest["data"][0]["content"][0]["text"] == "4" and newest["has_more"] is True


def test_a_response_that_is_not_to_be_stored_is_not(client):
    response = created(client, input="x", store=False)
    assert response["store"] is False
    assert client.get(f"{RESPONSES}/{response['id']}").status_code == 404


def test_streamed_responses_are_stored(client):
    events = client.post(RESPONSES, json={"input": "x", "stream": True}).text.split("\n\n")
    last = json.loads(events[-2].split("data: ")[1])
    assert client.get(f"{RESPONSES}/{last['response']['id']}").json() == last["response"]


def test_a_continuation_answers_the_calls_of_the_response(client, backend):
    first = created(client, input="weather?", tools=[WEATHER])
    call = first["output"][-1]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    second = created(client, input=[output], previous_response_id=first["id"], tools=[WEATHER])
    assert second["status"] == "completed" and "rain" in prompt_of(backend)
    other = client.post(
        RESPONSES, json={"input": [{**output, "call_id": "other"}], "previous_response_id": first["id"]}
    )
    assert other.status_code == 400 and other.json()["error"]["param"] == "input[0].call_id"


def test_references_to_stored_items_are_replaced(client, backend):
    first = created(client, input="first question")
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    created(client, input=[reference, {"role": "user", "content": "more"}])
    assert "assistant\n" in prompt_of(backend) and "first question" in prompt_of(backend)


def test_small_requests_make_no_large_conversation():
    with running(StubBackend(), max_body_bytes=50_000) as server, connect(server) as client:
        first = created(client, input="word " * 300)
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        response = client.post(RESPONSES, json={"input": [reference] * 100})
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
        assert "characters" in response.json()["error"]["message"]
        for path in (RESPONSES, COMPACT, f"{RESPONSES}/input_tokens"):
            body = {"model": "stub", "input": [reference] * 100, "previous_response_id": first["id"]}
            assert client.post(path, json=body).json()["error"]["code"] == "context_length_exceeded"


def stored(number, num_bytes=10):
    return StoredResponse({"id": f"resp_{number}", "output": [{"id": f"msg_{number}"}]}, (), (), 0, num_bytes)


def test_the_store_is_bounded_and_drops_what_was_not_used_for_longest():
    store = ResponseStore(30, 1000.0)
    for number in range(3):
        store.put(stored(number))
    assert store.get("resp_0") is not None
    store.put(stored(3))
    assert [number for number in range(4) if store.get(f"resp_{number}")] == [0, 2, 3]
    store.put(stored(4, num_bytes=31))
    assert store.get("resp_4") is None and len(store) == 3
    store.put(stored(5, num_bytes=30))
    assert len(store) == 1 and store.find_item("msg_0") is None and store.find_item("msg_5") == {"id": "msg_5"}


def test_stored_responses_expire_after_their_last_use():
    now = [0.0]
    store = ResponseStore(1000, 10.0, clock=lambda: now[0])
    store.put(stored(0))
    store.put(stored(1))
    now[0] = 9.0
    assert store.get("resp_0") is not None
    now[0] = 11.0
    assert store.get("resp_1") is None and store.get("resp_0") is not None and len(store) == 1
    now[0] = 22.0
    assert len(store) == 0 and not store.delete("resp_0")


def test_a_server_without_a_store_says_that_a_response_is_not_found():
    with running(StubBackend(), response_store_bytes=0) as server, connect(server) as client:
        response = created(client, input="x")
        assert client.get(f"{RESPONSES}/{response['id']}").status_code == 404


# --- what the response says, and what clients send --------------------------------------------------------------------


def test_the_response_repeats_the_settings(client):
    response = created(client, input="x")
    fields = ("max_tool_calls", "safety_identifier", "prompt_cache_key")
    assert [response[name] for name in fields] == [None] * 3
    assert (response["presence_penalty"], response["frequency_penalty"], response["top_logprobs"]) == (0, 0, 0)
    assert (response["background"], response["service_tier"], response["truncation"]) == (False, "default", "disabled")
    given = {"max_tool_calls": 3, "safety_identifier": "s", "prompt_cache_key": "k", "presence_penalty": 0.5}
    given |= {"metadata": {"a": "b"}, "truncation": "auto", "parallel_tool_calls": False, "user": "u"}
    response = created(client, input="x", **given)
    assert {name: response[name] for name in given} == given


LOGPROBS = {"include": ["message.output_text.logprobs"]}
SPOKEN = "Grüße, 日本. "


def speak(prompt, request):
    """Think, speak, call and speak again, in pieces that split characters and marks."""
    text = f"<think>Hm.</think>{SPOKEN}{CALL}Bye."
    return (Step((text[start : start + 3],)) for start in range(0, len(text), 3))


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_tokens_of_messages(stream):
    body = {"input": "x", "tools": [WEATHER], **LOGPROBS, "top_logprobs": 2, "stream": stream}
    with running(StubBackend(speak)) as server, connect(server) as client:
        reply = client.post(RESPONSES, json=body)
    events = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n") if line.startswith("data: ")]
    response = events[-1]["response"] if stream else reply.json()
    assert response["top_logprobs"] == 2
    parts = [item["content"][0] for item in response["output"] if item["type"] == "message"]
    assert [part["text"].strip() for part in parts] == [SPOKEN.strip(), "Bye."]
    for part in parts:
        assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]) == part["text"].encode()
        assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {2}
    if stream:
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        assert sum((delta["logprobs"] for delta in deltas), []) == sum((part["logprobs"] for part in parts), [])
        done = [event["logprobs"] for event in events if event["type"] == "response.output_text.done"]
        assert done == [part["logprobs"] for part in parts]


def test_a_response_without_log_probabilities_has_empty_lists(client):
    (item,) = created(client, input="x")["output"]
    assert item["content"][0]["logprobs"] == []


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"background": True}, "set stream to true"),
        ({"conversation": "conv_1"}, "previous_response_id"),
        ({"top_logprobs": 2}, "message.output_text.logprobs"),
    ],
)
def test_what_responses_cannot_do_is_refused_with_advice(client, fields, advice):
    response = client.post(RESPONSES, json={"input": "x", **fields})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == next(iter(fields)) and advice in error["message"]
    assert client.post(RESPONSES, json={"input": "x", "background": False, "top_logprobs": 0}).status_code == 200


@pytest.mark.parametrize("part", [{"type": "input_image", "image_url": "x"}, {"type": "input_file", "file_id": "x"}])
def test_images_and_files_are_refused_in_clear_words(client, part):
    content = [{"type": "input_text", "text": "What is this?"}, part]
    error = client.post(RESPONSES, json={"input": [{"role": "user", "content": content}]}).json()["error"]
    assert error["param"] == "input[0].content[1]" and "text only" in error["message"]


def test_tools_and_items_of_servers_that_run_tools_are_skipped_with_a_warning(client, backend):
    body = {
        "input": [
            {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
            {"role": "user", "content": "hello"},
        ],
        "tools": [{"type": "web_search", "external_web_access": False}, WEATHER, {"type": "namespace", "tools": []}],
    }
    response = client.post(RESPONSES, json=body)
    assert response.status_code == 200 and [tool["type"] for tool in response.json()["tools"]] == ["function"]
    warning = response.headers["x-openmimo-warning"]
    assert all(part in warning for part in ("tools[0]: web_search", "tools[2]: namespace", "input[0]: web_search_call"))
    assert "get_weather" in prompt_of(backend) and "web_search" not in prompt_of(backend)
    streamed = client.post(RESPONSES, json={**body, "stream": True})
    assert streamed.headers["x-openmimo-warning"] == warning
    assert "x-openmimo-warning" not in client.post(RESPONSES, json={"input": "x"}).headers


def test_what_codex_sends(client, backend):
    command = {"type": "object", "properties": {"cmd": {"type": "string"}}, "additionalProperties": False}
    agents = {"type": "function", "name": "spawn", "description": "", "strict": False, "parameters": command}
    body = {
        "model": "stub",
        "input": [
            {
                "type": "message",
                "id": "msg_1",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Agent."}],
            },
            {"type": "message", "id": "msg_2", "role": "user", "content": [{"type": "input_text", "text": "ls"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None, "content": None},
            {
                "type": "function_call",
                "id": "fc_1",
                "status": "completed",
                "name": "exec_command",
                "arguments": '{"cmd": "ls"}',
                "call_id": "call_1",
            },
            {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "Exit code 0\na.txt\n"},
        ],
        "tools": [
            {"type": "function", "name": "exec_command", "description": "", "strict": False, "parameters": command},
            {"type": "namespace", "name": "multi_agent", "description": "", "tools": [agents]},
            {"type": "web_search", "external_web_access": True},
            {
                "type": "custom",
                "name": "apply_patch",
                "format": {"type": "grammar", "syntax": "lark", "definition": "x"},
            },
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": None, "summary": "auto"},
        "text": {"verbosity": "low"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a22165",
        "client_metadata": {"x-codex-installation-id": "1", "x-codex-turn-metadata": '{"turn": 1}'},
    }
    response = client.post(RESPONSES, json=body)
    assert response.status_code == 200 and "event: response.completed" in response.text
    for part in ("system\nAgent.", "exec_command", "a.txt"):
        assert part in prompt_of(backend)
    warning = response.headers["x-openmimo-warning"]
    assert "unknown" not in warning and "tools[3]: custom" in warning
    strict = {name: value for name, value in body.items() if name != "stream"}
    with running(StubBackend(max_positions=9999), strict=True) as server:
        assert httpx.post(server.url + RESPONSES, json=strict).status_code == 200


def test_allowed_tools_are_the_tools_of_the_prompt(client, backend):
    other = {"type": "function", "name": "get_time"}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}
    response = created(client, input="x", tools=[WEATHER, other], tool_choice=allowed)
    assert response["tool_choice"] == allowed and len(response["tools"]) == 2
    assert "get_time" in prompt_of(backend) and "get_weather" not in prompt_of(backend)
    error = client.post(RESPONSES, json={"input": "x", "tools": [WEATHER], "tool_choice": allowed}).json()["error"]
    assert error["param"] == "tool_choice.tools"


def test_truncation_leaves_out_the_oldest_turns():
    backend = StubBackend(max_positions=200)
    turns = [{"role": "system", "content": "Be brief."}]
    turns += [{"role": "user", "content": f"question {number} " + "x" * 40} for number in range(20)]
    with running(backend) as server, connect(server) as client:
        error = client.post(RESPONSES, json={"input": turns}).json()["error"]
        assert error["code"] == "context_length_exceeded"
        created(client, input=turns, truncation="auto", max_output_tokens=1)
        prompt = prompt_of(backend)
        assert "Be brief." in prompt and "question 19" in prompt and "question 0 " not in prompt
        long = [{"role": "user", "content": "long " * 400}]
        assert client.post(RESPONSES, json={"input": long, "truncation": "auto"}).status_code == 400


def test_reasoning_comes_back_in_the_field_that_clients_return(client, backend):
    body = {"input": "think about the weather", "tools": [WEATHER], "store": False}
    first = created(client, **body, include=["reasoning.encrypted_content"])
    reasoning, call = first["output"]
    assert reasoning["content"][0]["text"] == "Look it up." and reasoning["encrypted_content"]
    kept = {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    question = {"role": "user", "content": body["input"]}
    created(client, input=[question, kept, call, result], tools=[WEATHER])
    assert "Look it up." in prompt_of(backend)
    foreign = {**kept, "encrypted_content": "gAAAAABfromelsewhere"}
    created(client, input=[question, foreign, call, result], tools=[WEATHER])
    assert "Look it up." not in prompt_of(backend)


def test_reasoning_is_the_summary_if_a_summary_is_asked_for(client, backend):
    body = {"input": "think about the weather", "tools": [WEATHER], "reasoning": {"summary": "auto"}}
    item, call = created(client, **body)["output"]
    assert item["summary"] == [{"type": "summary_text", "text": "Look it up."}] and "content" not in item
    data = client.post(RESPONSES, json={**body, "stream": True}).text.split("\n\n")
    events = [json.loads(one.split("data: ")[1]) for one in data if "reasoning_summary" in one]
    assert [event["type"].removeprefix("response.reasoning_summary_") for event in (events[0], *events[-2:])] == [
        "part.added", "text.done", "part.done",
    ]  # fmt: skip
    deltas = "".join(event["delta"] for event in events if event["type"].endswith("text.delta"))
    assert deltas == events[-2]["text"] == events[-1]["part"]["text"] == "Look it up."
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    created(client, input=[{"role": "user", "content": body["input"]}, item, call, result], tools=[WEATHER])
    assert "Look it up." in prompt_of(backend)


def test_input_tokens_are_counted(client, backend):
    body = {"input": "hello there", "tools": [WEATHER], "instructions": "Be brief."}
    count = client.post(f"{RESPONSES}/input_tokens", json=body).json()
    response = created(client, **body)
    assert count == {"object": "response.input_tokens", "input_tokens": response["usage"]["input_tokens"]}
    assert count["input_tokens"] == len(backend.requests[-1].prompt_token_ids)


# --- compaction -------------------------------------------------------------------------------------------------------


def test_a_compacted_conversation_goes_on(client, backend):
    turns = [
        {"role": "user", "content": "The launch is on Tuesday."},
        {"role": "assistant", "content": "Noted: Tuesday."},
    ]
    compacted = client.post(COMPACT, json={"model": "stub", "input": turns, "prompt_cache_key": "k"}).json()
    assert compacted["object"] == "response.compaction" and compacted["usage"]["total_tokens"] > 0
    assert [item["type"] for item in compacted["output"]] == ["compaction"]
    assert "Noted: Tuesday." in prompt_of(backend)
    created(client, input=[*compacted["output"], {"role": "user", "content": "When?"}])
    prompt = prompt_of(backend)
    assert "user\nThe launch is on Tuesday." in prompt and "user\nWhen?" in prompt
    assert "Summarize this conversation" in prompt  # the stub's summary is the request for it
    again = client.post(COMPACT, json={"model": "stub", "input": compacted["output"]}).json()
    created(client, input=[*again["output"], {"role": "user", "content": "When?"}])
    assert prompt_of(backend).count("The launch is on Tuesday.") == 1


def test_a_stored_response_is_compacted(client, backend):
    first = created(client, input="The code word is slate.")
    compacted = client.post(COMPACT, json={"model": "stub", "previous_response_id": first["id"]})
    assert compacted.status_code == 200 and "The code word is slate." in prompt_of(backend)


# --- WebSocket --------------------------------------------------------------------------------------------------------


class Socket:
    """A WebSocket connection to an app in this process."""

    def __init__(self, session):
        self._session = session

    def turn(self, **body):
        """Send a request, and return its last event, after a look at the order of the events."""
        self._session.send_text(json.dumps({"type": "response.create", **body}))
        kinds = []
        while True:
            event = self._session.receive_json()
            if event["type"] == "error":
                assert not kinds
                return event
            assert event["sequence_number"] == len(kinds)
            kinds.append(event["type"])
            if event["type"] in ("response.completed", "response.incomplete", "response.failed"):
                assert kinds[:2] == ["response.created", "response.in_progress"]
                return event


def app_client(backend=None, **settings):
    return TestClient(create_app(backend or StubBackend(script), ServerConfig(**settings)), base_url="http://localhost")


def test_a_socket_continues_its_last_response_and_no_other():
    backend = StubBackend(script)
    with app_client(backend) as client:
        with client.websocket_connect(SOCKET) as session:
            socket = Socket(session)
            first = socket.turn(input="code word cobalt", store=False)["response"]
            second = socket.turn(input="which?", store=False, previous_response_id=first["id"])["response"]
            assert "code word cobalt" in prompt_of(backend) and second["status"] == "completed"
            gone = socket.turn(input="x", store=False, previous_response_id=first["id"])
            assert gone["error"]["code"] == "previous_response_not_found" and gone["status"] == 400
        with client.websocket_connect(SOCKET) as session:
            socket = Socket(session)
            elsewhere = socket.turn(input="x", previous_response_id=second["id"])
            assert elsewhere["error"]["code"] == "previous_response_not_found"
            kept = socket.turn(input="code word copper")["response"]
        assert client.post(RESPONSES, json={"input": "x", "previous_response_id": kept["id"]}).status_code == 200
        assert client.get(f"{RESPONSES}/{second['id']}").status_code == 404


def test_a_socket_reads_a_prompt_before_its_question_comes():
    backend = StubBackend(script)
    with app_client(backend) as client, client.websocket_connect(SOCKET) as session:
        socket = Socket(session)
        warm = socket.turn(input="The code word is opal.", store=False, generate=False)["response"]
        assert warm["status"] == "completed" and warm["output"] == [] and backend.requests[-1].params.max_tokens == 1
        socket.turn(input="Which?", store=False, previous_response_id=warm["id"])
        assert "The code word is opal." in prompt_of(backend)


def test_a_failed_turn_drops_the_response_that_it_continued():
    with app_client() as client, client.websocket_connect(SOCKET) as session:
        socket = Socket(session)
        first = socket.turn(input="hello", store=False)["response"]
        output = {"type": "function_call_output", "call_id": "none", "output": "x"}
        failed = socket.turn(input=[output], store=False, previous_response_id=first["id"])
        assert failed["status"] == 400 and failed["error"]["param"] == "input[0].call_id"
        retried = socket.turn(input="x", store=False, previous_response_id=first["id"])
        assert retried["error"]["code"] == "previous_response_not_found"


def test_an_engine_error_ends_the_turn_and_not_the_connection():
    def breaks(prompt, request):
        return [Step(("It ",)), Step((), error="out of pages")] if "break" in prompt else [Step(("fine",))]

    with app_client(StubBackend(breaks)) as client, client.websocket_connect(SOCKET) as session:
        socket = Socket(session)
        assert socket.turn(input="break down")["response"]["status"] == "failed"
        assert text_of(socket.turn(input="go on")["response"]) == "fine"


@pytest.mark.parametrize(
    "message", ["{", "[]", '{"input": "x"}', '{"type": "session.update"}', '{"type": "response.create"}', b"\xff"]
)
def test_messages_that_are_no_requests(message):
    with app_client() as client, client.websocket_connect(SOCKET) as session:
        session.send_bytes(message) if isinstance(message, bytes) else session.send_text(message)
        error = session.receive_json()
        assert error["type"] == "error" and error["status"] == 400 and error["error"]["code"]
        assert Socket(session).turn(input="x")["response"]["status"] == "completed"


def test_a_client_that_leaves_its_socket_frees_its_request():
    def endless(prompt, request):
        while True:
            yield Step((" word",))

    backend = StubBackend(endless, step_seconds=0.001)
    with app_client(backend) as client:
        with client.websocket_connect(SOCKET) as session:
            session.send_text(json.dumps({"type": "response.create", "input": "x", "max_output_tokens": 4000}))
            while session.receive_json()["type"] != "response.output_text.delta":
                pass
            assert backend.running
        assert client.get("/health").status_code == 200
        assert not backend.running


def test_a_connection_has_a_time_limit(monkeypatch):
    monkeypatch.setattr(socket_module, "_CONNECTION_SECONDS", 0.05)
    with app_client() as client, client.websocket_connect(SOCKET) as session:
        error = session.receive_json()
        assert error["error"]["code"] == "websocket_connection_limit_reached"
        with pytest.raises(WebSocketDisconnect):
            session.receive_json()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer secret"}, None),
        ({"x-api-key": "secret"}, None),
    ],
)
def test_sockets_need_the_key(headers, status):
    with app_client(api_key="secret") as client:
        if status is None:
            with client.websocket_connect(SOCKET, headers=headers) as session:
                assert Socket(session).turn(input="x")["response"]["status"] == "completed"
        else:
            with pytest.raises(WebSocketDenialResponse) as denial, client.websocket_connect(SOCKET, headers=headers):
                pass
            assert denial.value.status_code == status


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"host": "evil.example"}])
def test_pages_of_other_sites_may_not_open_a_socket(headers):
    with (
        app_client() as client,
        pytest.raises(WebSocketDenialResponse) as denial,
        client.websocket_connect(SOCKET, headers=headers),
    ):
        pass
    assert denial.value.status_code == 403


def test_a_page_of_an_allowed_origin_may_open_a_socket():
    with (
        app_client(allowed_origins=("http://good.example",)) as client,
        client.websocket_connect(SOCKET, headers={"origin": "http://good.example"}) as session,
    ):
        assert Socket(session).turn(input="x")["response"]["status"] == "completed"
