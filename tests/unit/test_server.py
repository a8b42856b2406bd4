"""The server on its stub backend: limits, errors, disconnects, draining, metrics, and the engine's requests."""

import asyncio
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
from contextlib import redirect_stdout

import httpx
import pytest
from server_thread import connect, running, wait_until

from openmimo.core.errors import ConfigError
from openmimo.core.records import Request, SamplingParams
from openmimo.data.chat.template import encode_chat
from openmimo.engine.server.backends.stub import Step, StubBackend
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.errors import ApiError
from openmimo.engine.server.http.service import Service
from openmimo.engine.server.serve import serve

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello there"}]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "get_time"}}


def endless(prompt, request):
    while True:
        yield Step((" word",))


@pytest.fixture(scope="module")
def backend():
    return StubBackend()


@pytest.fixture(scope="module")
def client(backend):
    with running(backend) as server, connect(server) as client:
        yield client


def error_of(response: httpx.Response) -> dict:
    """Checks the shape of an error response. Returns the error."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


def events_of(response: httpx.Response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


# --- refusals --------------------------------------------------------------------------------------------------------

BAD_CHATS = {
    "messages": {"messages": []},
    "messages[0].role": {"messages": [{"role": "wizard", "content": "x"}]},
    "messages[0].content[1].type": {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]}]},
    "messages[0].tool_calls[0].function.name": {"messages": [
        {"role": "assistant", "tool_calls": [{"function": {"name": "", "arguments": "{}"}}]}]},
    "temperature": {**HELLO, "temperature": -1},
    "top_p": {**HELLO, "top_p": 0},
    "logit_bias": {**HELLO, "logit_bias": {"x": 1}},
    "n": {**HELLO, "n": 1000},
    "max_tokens": {**HELLO, "max_tokens": 0},
    "min_tokens": {**HELLO, "min_tokens": 9, "max_tokens": 8},
    "max_repeats": {**HELLO, "max_repeats": 1},
    "stream_options": {**HELLO, "stream_options": {"include_usage": True}},
    "top_logprobs": {**HELLO, "top_logprobs": 2},
    "tool_choice": {**HELLO, "tool_choice": "required"},
    "tools": {**HELLO, "tools": [WEATHER, WEATHER]},
    "response_format": {**HELLO, "response_format": {"type": "json_schema"}},
    "structured_outputs": {**HELLO, "structured_outputs": {"regex": "a", "choice": ["b"]}},
    "reasoning_effort": {**HELLO, "reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
    "session": {**HELLO, "session": "a", "n": 2},
    "audio": {**HELLO, "audio": {"voice": "alloy"}},
    "functions": {**HELLO, "functions": [WEATHER["function"]]},
    "guided_json": {**HELLO, "guided_json": {"type": "object"}},
    "prompt_logprobs": {**HELLO, "prompt_logprobs": 1, "stream": True},
    "continue_final_message": {**HELLO, "continue_final_message": True, "add_generation_prompt": True},
    "tool_choice.allowed_tools.tools": {**HELLO, "tools": [WEATHER], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TIME]}}},
    "stop": {**HELLO, "stop": ["x"] * 17},
    "stop[1]": {**HELLO, "stop": ["x", 3]},
    "logit_bias.7": {**HELLO, "logit_bias": {"7": "x"}},
    "tools[0].function.parameters": {**HELLO, "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": 3}}}]},
    "modalities": {**HELLO, "modalities": ["audio"]},
}  # fmt: skip


@pytest.mark.parametrize(("param", "body"), BAD_CHATS.items(), ids=BAD_CHATS)
def test_what_is_wrong_with_a_chat_is_named(client, param, body):
    response = client.post(CHAT, json=body)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"] or "").startswith(param)
    assert param.split("[")[0] in error["message"] or error["code"] is None


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [1, 2, -3]}, "prompt[2]"),
        ("/v1/completions", {"prompt": [999_999]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", {"input": "x", "background": True}, "background"),
        ("/v1/responses", {}, "input"),
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"input": "x", "conversation": "conv_1"}, "conversation"),
        ("/v1/responses", {"input": "x", "top_logprobs": 2}, "top_logprobs"),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ("/v1/responses", {"input": [{"type": "no type"}]}, "input[0]"),
        ("/v1/responses", {"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ("/v1/responses", {"input": [{"role": "user", "content": 4}]}, "input[0].content"),
        ("/v1/responses", {"input": "x", "tools": [{"name": "f"}]}, "tools[0].type"),
        ("/v1/responses/compact", {"input": "x"}, "model"),
        ("/v1/responses/compact", {"model": "stub"}, "input"),
        ("/tokenize", {"prompt": "x", "messages": HELLO["messages"]}, None),
    ],
)
def test_what_is_wrong_elsewhere_is_named(client, path, body, param):
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop": 3}, "stop: it must be a text or a list."),
        ({"messages": "x"}, "messages: it must be a list."),
        ({"messages": [3]}, "messages[0]: it must be an object."),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: it must be a text or a list."),
        ({"tool_choice": 3}, "tool_choice: it must be a text or an object."),
        ({"response_format": "json"}, "response_format: it must be an object."),
        ({"stream": "yes"}, "stream: it must be true or false."),
        ({"metadata": {"topK": 1}}, "metadata.topK: it must be a text."),
    ],
)
def test_errors_name_types_of_json(client, change, message):
    assert error_of(client.post(CHAT, json={**HELLO, **change}))["message"] == message


@pytest.mark.parametrize("body", [b"{", b"[]", b"3", b'"\\ud800"', b'{"messages": NaN}', b"\xff", b"[" * 9999, b""])
def test_bodies_that_are_no_json_object(client, body):
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error_of(response)


def test_a_body_that_does_not_say_that_it_is_json_is_refused(client):
    # A page of another origin can send such a body to a server on this machine without a preflight request.
    response = client.post(CHAT, content=json.dumps(HELLO), headers={"Content-Type": "text/plain"})
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]


def test_unknown_paths_methods_and_models(client):
    assert (client.get("/nothing").status_code, error_of(client.get("/nothing"))["type"]) == (404, "not_found_error")
    response = client.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    error_of(response)
    for response in (client.get("/v1/models/gpt-5"), client.post(CHAT, json={**HELLO, "model": "gpt-5"})):
        assert response.status_code == 404
        assert (error_of(response)["param"], error_of(response)["code"]) == ("model", "model_not_found")


def test_a_prompt_that_is_too_long(client, backend):
    body = {"prompt": [5] * backend.max_positions}
    assert error_of(client.post("/v1/completions", json=body))["code"] == "context_length_exceeded"


def test_a_host_that_others_reach_needs_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="api_key"):
            ServerConfig(host=host)
        ServerConfig(host=host, api_key="secret")
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        ServerConfig(host=host)
    with pytest.raises(ConfigError, match="max_queue"):
        ServerConfig(max_queue=0)


HOSTS = {  # allowed hosts of a server without a key: hosts of requests, and whether it answers them
    (): {
        "localhost:8000": True,
        "127.5.5.5:80": True,
        "[::1]:8000": True,
        "LocalHost.": True,
        "rebound.example:8000": False,
        "localhost.evil.example": False,
        "evil.example/localhost": False,
    },
    ("models.example",): {"models.example": True, "other.example": False},
    ("*",): {"any.example": True},
}


@pytest.mark.parametrize("allowed", HOSTS)
def test_a_name_of_another_site_is_not_answered(allowed):
    requests = [("GET", "/"), ("GET", "/health"), ("GET", "/metrics"), ("POST", "/tokenize")]
    with running(StubBackend(), allowed_hosts=allowed) as server, connect(server) as client:
        for (host, answered), (method, path) in itertools.product(HOSTS[allowed].items(), requests):
            body = {"json": {"prompt": "x"}} if method == "POST" else {}
            response = client.request(method, path, headers={"Host": host}, **body)
            assert response.status_code == (200 if answered else 403), (host, path)
            if not answered:
                assert error_of(response)["code"] == "host_not_allowed"
                assert "--allowed-hosts" in error_of(response)["message"]


def test_with_a_key_any_name_is_answered_unless_some_are_named():
    for allowed, status in (((), 200), (("models.example",), 403)):
        with running(StubBackend(), api_key="k", allowed_hosts=allowed) as server, connect(server) as client:
            assert client.get("/health", headers={"Host": "other.example"}).status_code == status


def test_a_page_of_another_origin_may_not_send_anything(client):
    address = client.base_url.netloc.decode()
    for origin, status in ((f"http://{address}", 200), ("null", 403), ("https://evil.example", 403), (address, 403)):
        response = client.post("/tokenize", json={"prompt": "x"}, headers={"Origin": origin})
        assert response.status_code == status, origin
        assert "access-control-allow-origin" not in response.headers
    ask = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = client.options(CHAT, headers=ask)
    assert response.status_code == 403 and "--allowed-origins" in error_of(response)["message"]


def test_pages_of_allowed_origins_may_use_the_server():
    page = "https://page.example"
    ask = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    settings = {"api_key": "k", "allowed_origins": (page,)}
    with running(StubBackend(), **settings) as server, connect(server) as client:
        leave = client.options(CHAT, headers=ask)
        assert (leave.status_code, leave.headers["access-control-allow-origin"]) == (204, page)
        assert "POST" in leave.headers["access-control-allow-methods"]
        assert leave.headers["access-control-allow-headers"] == "authorization"
        key = {"Authorization": "Bearer k"}
        for headers, status in ((key, 200), ({}, 401)):
            response = client.post(CHAT, json=HELLO, headers={"Origin": page, **headers})
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, page)
            assert response.headers["vary"] == "Origin" and response.headers["access-control-expose-headers"]
        other = client.post(CHAT, json=HELLO, headers={"Origin": "https://other.example", **key})
        assert "access-control-allow-origin" not in other.headers
    with pytest.raises(ConfigError, match="allowed_origins"):
        ServerConfig(allowed_origins=("page.example",))
    with pytest.raises(ConfigError, match="allowed_hosts"):
        ServerConfig(allowed_hosts=("http://page.example",))


def test_the_key_guards_the_api_and_nothing_else():
    with running(StubBackend(), api_key="secret") as server, connect(server) as client:
        for path in ("/v1/models", "/v1/nothing"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                response = client.get(path, headers=headers)
                assert (response.status_code, error_of(response)["type"]) == (401, "authentication_error")
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert [client.get(path).status_code for path in ("/", "/health", "/metrics")] == [200, 200, 200]


def test_the_size_of_a_body_is_limited_chunked_or_not():
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}], "user": "x" * 2000}).encode()
    json_type = {"Content-Type": "application/json"}

    def chunks():
        for start in range(0, len(body), 512):
            yield body[start : start + 512]

    with running(StubBackend(), max_body_bytes=4096) as server, connect(server) as client:
        for content in (body, chunks()):
            response = client.post(CHAT, content=content, headers=json_type)
            assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
        assert client.post(CHAT, json=HELLO).status_code == 200
    with running(StubBackend(), max_body_bytes=len(body)) as server, connect(server) as client:
        assert client.post(CHAT, content=chunks(), headers=json_type).status_code == 200


# --- load and time ---------------------------------------------------------------------------------------------------


def test_a_full_queue_sends_clients_away():
    backend = StubBackend(endless, slots=1, step_seconds=0.002, max_positions=10**6)
    with running(backend, max_queue=1, retry_after_seconds=7) as server:
        with connect(server) as client, client.stream("POST", CHAT, json={**HELLO, "stream": True}):
            wait_until(lambda: backend.running)
            service = server.config.app.state.service
            wait_until(lambda: service.num_waiting == 0)
            with client.stream("POST", CHAT, json={**HELLO, "stream": True}):
                response = client.post(CHAT, json=HELLO)
                assert (response.status_code, response.headers["retry-after"]) == (429, "7")
                assert error_of(response)["code"] == "queue_full"
        wait_until(lambda: service.num_active == service.num_waiting == 0)
        wait_until(lambda: not backend.running)


def test_a_reply_that_takes_too_long():
    backend = StubBackend(endless, step_seconds=0.01, max_positions=10**6)
    with running(backend, request_timeout_seconds=0.2) as server, connect(server) as client:
        response = client.post(CHAT, json=HELLO)
        assert (response.status_code, error_of(response)["type"]) == (504, "timeout_error")
        last = events_of(client.post(CHAT, json={**HELLO, "stream": True}))[-1]
        assert last["error"]["type"] == "timeout_error"
        wait_until(lambda: not backend.running)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request(path, stream):
    backend = StubBackend(endless, step_seconds=0.002, max_positions=10**6)
    prompt = {CHAT: HELLO, "/v1/completions": {"prompt": "x", "max_tokens": 9999}, "/v1/responses": {"input": "x"}}[
        path
    ]
    body = json.dumps({**prompt, "stream": stream}).encode()
    headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n"
    with running(backend) as server:
        address = server.servers[0].sockets[0].getsockname()
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: backend.running)
        wait_until(lambda: not backend.running)
        wait_until(lambda: server.config.app.state.service.num_active == 0)
        assert backend.gauges().num_waiting == 0


def test_waiting_requests_of_a_client_that_leaves_are_forgotten():
    backend = StubBackend(endless, slots=1, step_seconds=0.002, max_positions=10**6)
    with running(backend) as server, connect(server) as client:
        with client.stream("POST", CHAT, json={**HELLO, "n": 3, "stream": True}):
            wait_until(lambda: backend.gauges().num_waiting == 2)
        wait_until(lambda: backend.gauges().num_waiting == 0 and not backend.running)
        assert backend.gauges().num_running == 0


def test_draining_lets_running_requests_finish():
    backend = StubBackend(lambda prompt, request: [Step((" word",))] * 40, step_seconds=0.01)
    with running(backend) as server, connect(server) as client:
        replies = []
        asking = threading.Thread(target=lambda: replies.append(client.post(CHAT, json=HELLO)))
        asking.start()
        wait_until(lambda: backend.running)
        server.begin_drain()
        wait_until(lambda: server.config.app.state.service.is_draining)
        refused, health = client.post(CHAT, json=HELLO), client.get("/health")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
        assert refused.headers["retry-after"] and health.status_code == 503
        asking.join()
        assert replies[0].json()["choices"][0]["message"]["content"] == " word" * 40
        wait_until(lambda: server.should_exit)


def test_draining_ends_what_does_not_finish():
    backend = StubBackend(endless, step_seconds=0.01, max_positions=10**6)
    with running(backend, drain_timeout_seconds=0.1) as server, connect(server) as client:
        with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
            wait_until(lambda: backend.running)
            server.begin_drain()
            response.read()
        assert events_of(response)[-1]["error"]["code"] == "draining"
        wait_until(lambda: server.should_exit and not backend.running)


def _serve(output: int) -> None:
    """Serves replies of 30 slow steps, and prints to the file descriptor."""
    backend = StubBackend(lambda prompt, request: [Step((" word",))] * 30, step_seconds=0.02)
    with open(output, "w") as stream, redirect_stdout(stream):
        serve(backend, ServerConfig(port=0))


def test_sigterm_drains_a_process():
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(writer,))
    process.start()
    os.close(writer)
    with open(reader) as output:
        url = re.search(r"http://[\d.:]+", output.readline())[0]
    with httpx.stream("POST", url + CHAT, json={**HELLO, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(process.pid, signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    process.join(20)
    assert process.exitcode == 0


# --- failures of the engine ------------------------------------------------------------------------------------------


def test_engine_errors_reach_the_client_whole_and_streamed():
    def break_down(prompt, request):
        yield Step((" so", " far"))
        yield Step((), error="out of pages")

    with running(StubBackend(break_down)) as server, connect(server) as client:
        response = client.post(CHAT, json=HELLO)
        assert response.status_code == 500
        assert "out of pages" in error_of(response)["message"]
        events = events_of(client.post(CHAT, json={**HELLO, "stream": True}))
        assert events[1]["choices"][0]["delta"]["content"] == " so far"
        assert "out of pages" in events[-1]["error"]["message"]
        events = events_of(client.post("/v1/responses", json={"input": "x", "stream": True}))
        assert events[-2]["type"] == "response.failed"
        assert "out of pages" in events[-1]["error"]["message"]


def test_an_exception_in_the_backend_is_no_silent_end(caplog):
    def fall_over(prompt, request):
        yield Step((" so",))
        raise ZeroDivisionError

    with running(StubBackend(fall_over)) as server, connect(server) as client:
        assert error_of(client.post(CHAT, json=HELLO))["code"] == "engine_error"
        assert "error" in events_of(client.post(CHAT, json={**HELLO, "stream": True, "n": 2}))[-1]
        assert "ZeroDivisionError" in caplog.text
        assert client.get("/health").status_code == 200


def test_a_dead_engine_is_reported():
    backend = StubBackend()
    with running(backend) as server, connect(server) as client:
        backend.is_healthy = False
        for response in (client.get("/health"), client.post(CHAT, json=HELLO)):
            assert (response.status_code, error_of(response)["code"]) == (503, "engine_unhealthy")


# --- requests to the engine and replies ------------------------------------------------------------------------------


def test_sampling_fields_reach_the_engine(client, backend):
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.3, "frequency_penalty": -0.4,
        "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True, "max_repeats": 4,
    }  # fmt: skip
    body = {**HELLO, **fields, "stop": "end", "stop_token_ids": [3], "logit_bias": {"5": -1.5}, "max_tokens": 9}
    assert client.post(CHAT, json={**body, "seed": -1, "priority": 3, "session": "a"}).status_code == 200
    request = backend.requests[-1]
    assert {name: getattr(request.params, name) for name in fields} == fields
    assert (request.params.stop, request.params.stop_token_ids, request.params.logit_bias) == (
        ("end",),
        (3,),
        {5: -1.5},
    )
    assert (request.params.max_tokens, request.params.seed) == (9, 2**63 - 1)
    assert (request.priority, request.session) == (3, "a")
    assert not request.params.skip_special_tokens


def test_choices_have_seeds_of_their_own(client, backend):
    del backend.requests[:]
    client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 3, "seed": 11})
    seeds = [request.params.seed for request in backend.requests]
    assert seeds[0] == 11 and seeds[:3] == seeds[3:] and len(set(seeds)) == 3
    assert len({request.id for request in backend.requests}) == 6


def test_the_reply_may_fill_the_rest_of_the_context(client, backend):
    client.post(CHAT, json=HELLO)
    request = backend.requests[-1]
    assert len(request.prompt_token_ids) + request.params.max_tokens >= backend.max_positions


@pytest.mark.parametrize(
    ("given", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
        ({"structured_outputs": {"choice": ["a.", "b"]}}, "regex", r"a\.|b"),
        ({"structured_outputs": {"json": {"type": "null"}}}, "json_schema", '{"type": "null"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}},
            "json_schema",
            '{"type": "null"}',
        ),
    ],
)
def test_structures_reach_the_engine(client, backend, given, kind, source):
    assert client.post(CHAT, json={**HELLO, **given}).status_code == 200
    structure = backend.requests[-1].params.structure
    assert (structure.kind, structure.source) == (kind, source)


def prompt_of(backend: StubBackend) -> str:
    return backend.tokenizer.decode(backend.requests[-1].prompt_token_ids, skip_special=False)


def test_tool_choice_begins_the_call_that_must_come(client, backend):
    tools = {**HELLO, "tools": [WEATHER, TIME]}
    client.post(CHAT, json=tools)
    assert "get_weather" in prompt_of(backend) and prompt_of(backend).endswith("</think>")
    client.post(CHAT, json={**tools, "tool_choice": "none"})
    assert "get_weather" not in prompt_of(backend)
    client.post(CHAT, json={**tools, "tool_choice": {"type": "function", "function": {"name": "get_time"}}})
    assert prompt_of(backend).endswith("<tool_call>\n<function=get_time>\n")
    client.post(CHAT, json={**tools, "tool_choice": "required"})
    assert prompt_of(backend).endswith("<tool_call>\n<function=")
    pattern = backend.requests[-1].params.structure.source
    assert re.fullmatch(pattern, "get_time>\n<parameter=a>\nb</parameter>\n</function>\n</tool_call>")
    assert not re.fullmatch(pattern, "other>\n</function>") and not re.fullmatch(pattern, "get_time>\n")
    answer = client.post(CHAT, json={**tools, "tool_choice": {"type": "function", "function": {"name": "nope"}}})
    assert error_of(answer)["param"] == "tool_choice"


def test_one_call_only_where_calls_may_not_be_parallel():
    call = "<tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n</function>\n</tool_call>"
    with running(StubBackend(lambda prompt, request: [Step((call + call,))] * 9)) as server, connect(server) as client:
        for body, most in (({}, 18), ({"parallel_tool_calls": False}, 1)):
            body = {**HELLO, "tools": [WEATHER], **body}
            choice = client.post(CHAT, json=body).json()["choices"][0]
            assert len(choice["message"]["tool_calls"]) == most
            assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
            events = events_of(client.post(CHAT, json={**body, "stream": True}))
            parts = [part for event in events for part in event["choices"][0]["delta"].get("tool_calls", [])]
            assert {part["index"] for part in parts} == set(range(most))
            assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_off_is_not_taken_for_a_whole_one():
    call = "<tool_call>\n<function=get_weather>\nAh. <parameter=city>Os"
    with running(StubBackend(lambda prompt, request: [Step((call,))])) as server, connect(server) as client:
        choice = client.post(CHAT, json=HELLO).json()["choices"][0]
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Os'
        assert choice["message"]["content"] == "\nAh. "
        events = events_of(client.post("/v1/responses", json={"input": "x", "stream": True}))
    output = events[-1]["response"]["output"]
    assert [(item["type"], item["status"]) for item in output] == [
        ("function_call", "incomplete"),
        ("message", "completed"),
    ]
    assert output[0]["arguments"] == '{"city": "Os'


def test_thinking_comes_and_goes_as_reasoning_content(client, backend):
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "I must look.", "refusal": None, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": "4 degrees"},
    ]  # fmt: skip
    response = client.post(CHAT, json={"messages": turns, "tools": [WEATHER], "reasoning_effort": "low"})
    assert response.status_code == 200
    text = prompt_of(backend)
    assert text.startswith("<|im_start|>system\nBe brief.") and "<think>I must look.</think><tool_call>" in text
    assert "<parameter=city>Oslo</parameter>" in text and "4 degrees" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_token_details_and_ids_tell_the_whole_reply():
    def think(prompt, request):
        yield Step(("<think>", "because", "</think>"))
        yield Step(("né", " 日", "!"))

    body = {**HELLO, "stream": True, "return_token_ids": True, "chat_template_kwargs": {"enable_thinking": True}}
    body["stream_options"] = {"token_details": True, "include_usage": True}
    backend = StubBackend(think)
    with running(backend) as server, connect(server) as client:
        *events, last = events_of(client.post(CHAT, json=body))
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["delta"].get("reasoning_content", "") for choice in choices) == "because"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "né 日!"
    details = [detail for choice in choices for detail in choice.get("token_details", [])]
    ids = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
    assert "".join(detail["text"] for detail in details) == "<think>because</think>né 日!"
    assert backend.tokenizer.decode(ids) == "<think>because</think>né 日!"
    assert sum(detail["drafted"] for detail in details) == len(ids) - 2
    counts = last["usage"]["completion_tokens_details"]
    assert counts["reasoning_tokens"] == len(backend.tokenizer.encode("because"))
    assert counts["accepted_prediction_tokens"] == len(ids) - 2
    assert last["usage"]["completion_tokens"] == len(ids)


def test_a_character_cut_in_half_is_flushed_at_the_end():
    with running(StubBackend(lambda prompt, request: [Step(("日本",))])) as server, connect(server) as client:
        body = {"prompt": "x", "max_tokens": 4, "stream": True}
        events = events_of(client.post("/v1/completions", json=body))
    assert "".join(event["choices"][0]["text"] for event in events) == "日\ufffd"


def test_line_ends_of_unicode_do_not_cut_events():
    script = [Step(("a\u2028b\x85c",))]
    with (
        running(StubBackend(lambda prompt, request: script)) as server,
        connect(server) as client,
        client.stream("POST", CHAT, json={**HELLO, "stream": True}) as response,
    ):
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "a\u2028b\x85c"


def test_an_echoed_prompt_is_scored_without_a_new_token(client, backend):
    body = {"prompt": "abc", "echo": True, "max_tokens": 0, "logprobs": 0, "return_token_ids": True}
    answer = client.post("/v1/completions", json=body).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("abc", "length", [])
    assert choice["prompt_token_ids"] == backend.tokenizer.encode("abc")
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert [value is None for value in choice["logprobs"]["token_logprobs"]] == [True, False, False]
    assert answer["usage"]["completion_tokens"] == 0


def test_tokenize_and_detokenize(client, backend):
    answer = client.post("/tokenize", json={"prompt": "a <think> é"}).json()
    assert answer["tokens"] == backend.tokenizer.encode("a <think> é") and answer["count"] == len(answer["tokens"])
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "a <think> é"}
    ids = client.post("/tokenize", json=HELLO).json()["tokens"]
    assert ids == encode_chat(backend.tokenizer, HELLO["messages"])


def test_metrics_count_requests_tokens_and_drafts():
    def steps(prompt, request):
        return [Step(("a",)), Step(("b", "c", "d")), Step(("e", "f"))]

    with running(StubBackend(steps)) as server, connect(server) as client:
        assert client.post("/v1/completions", json={"prompt": "xyz", "n": 2}).status_code == 200
        client.post("/v1/completions", json={"prompt": []})
        client.get("/nothing/here")
        text = client.get("/metrics").text
    for line in (
        'openmimo_http_requests_total{path="/v1/completions",status="200"} 1.0',
        'openmimo_http_requests_total{path="/v1/completions",status="400"} 1.0',
        'openmimo_http_requests_total{path="other",status="404"} 1.0',
        'openmimo_replies_total{finish_reason="stop"} 2.0',
        "openmimo_prompt_tokens_total 6.0",
        "openmimo_generated_tokens_total 12.0",
        'openmimo_drafts_offered_total{position="1"} 6.0',
        "openmimo_graphs 0.0",
        'openmimo_drafts_accepted_total{position="1"} 4.0',
        'openmimo_drafts_accepted_total{position="2"} 2.0',
        'openmimo_sequence_steps_total{drafts="0"} 0.0',
        'openmimo_sequence_steps_total{drafts="3"} 6.0',
        "openmimo_time_to_first_token_seconds_count 2.0",
        "openmimo_time_per_output_token_seconds_count 2.0",
        "openmimo_requests_running 0.0",
        "openmimo_cache_used_bytes 0.0",
    ):
        assert line in text.split("\n"), line


def test_the_page_may_load_nothing_from_elsewhere(client):
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    assert client.get("/page/chat.js").headers["content-security-policy"] == policy
    assert client.get("/page/../app.py").status_code == client.get("/page/%2e%2e/app.py").status_code == 404
    assert client.get("/docs").status_code == 404


# --- limits -----------------------------------------------------------------------------------------------------------


def test_replies_are_counted_before_any_prompt_is_encoded(client, backend, monkeypatch):
    def encode(*_, **__):
        raise AssertionError("a prompt was encoded")

    monkeypatch.setattr(type(backend.tokenizer), "encode", encode)
    response = client.post("/v1/completions", json={"prompt": ["a"] * 100, "n": 128})
    assert (response.status_code, error_of(response)["param"]) == (400, "n")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [None] * 200_000}, "prompt[0]"),
        ("/v1/completions", {"prompt": [""] * 100_000}, "prompt"),
        ("/v1/completions", {"prompt": "word " * 200_000}, "prompt"),
        ("/v1/completions", {"prompt": "x" * 600_000}, "prompt"),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"grammar": 'start: "a"\n' * 600}},
         "structured_outputs.grammar"),
        (CHAT, {**HELLO, "tools": [WEATHER] * 600}, "tools"),
        (CHAT, {**HELLO, "logit_bias": {str(i): 0 for i in range(5000)}}, "logit_bias"),
        (CHAT, {**HELLO, "response_format": {"type": "json_schema", "json_schema": {
            "schema": {"anyOf": [{"$ref": "#"}] * 300}}}}, "response_format.json_schema.schema"),
        ("/detokenize", {"tokens": [1] * 300_000}, "tokens"),
    ],
    ids=range(9),
)  # fmt: skip
def test_what_is_too_much_is_named_with_one_short_error(client, path, body, param):
    response = client.post(path, json=body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert len(response.content) < 2000


def test_health_answers_while_requests_are_prepared(monkeypatch):
    backend, goes_on = StubBackend(), threading.Event()
    monkeypatch.setattr(backend, "check", lambda request: goes_on.wait(20))
    with running(backend, max_queue=1) as server, connect(server) as client:
        asking = [threading.Thread(target=lambda: client.post(CHAT, json=HELLO)) for _ in range(2)]
        for thread in asking:
            thread.start()
        lane = server.config.app.state.service._small
        wait_until(lane._free.locked)
        assert client.get("/health").status_code == 200  # both threads are busy
        with socket.create_connection(server.servers[0].sockets[0].getsockname()) as connection:
            body = json.dumps(HELLO).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: lane._num_waiting == 1)
            response = client.post(CHAT, json=HELLO)
            assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
            assert client.get("/health").status_code == 200
        wait_until(lambda: lane._num_waiting == 0)  # a client that disconnects leaves the queue
        goes_on.set()
        for thread in asking:
            thread.join()
        assert client.post(CHAT, json=HELLO).status_code == 200


def test_the_sizes_of_open_requests_are_limited_together():
    backend = StubBackend(endless, step_seconds=0.01, max_positions=10**6)
    body = {**HELLO, "metadata": {str(i): "x" * 4000 for i in range(50)}}
    with running(backend, max_open_bytes=300_000) as server, connect(server) as client:
        with client.stream("POST", CHAT, json={**body, "stream": True}):
            wait_until(lambda: backend.running)
            response = client.post(CHAT, json=body)
            assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
            with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as small:
                assert small.status_code == 200
        wait_until(lambda: not backend.running)
        with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
            assert response.status_code == 200


def test_a_reply_that_is_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(limits, "UNREAD_DELTAS", 50)

    async def leave_unread() -> str:
        backend = StubBackend(endless, max_positions=10**6)
        request = Request("1", (5,), SamplingParams(max_tokens=10**5))
        generation = Service(backend, ServerConfig()).start([request])
        async with asyncio.timeout(20):
            while not backend.running:
                await asyncio.sleep(0)
            while backend.running:
                await asyncio.sleep(0)
        with pytest.raises(ApiError) as error:
            async for _ in generation.deltas():
                pass
        return error.value.code

    assert asyncio.run(leave_unread()) == "client_too_slow"
