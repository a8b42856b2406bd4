"""Every reply, whole and streamed, against the types of the openai and anthropic packages, strictly."""

import json

import pytest
from reply_types import check_type
from server_thread import connect, running

from openmimo.engine.server.backends.stub import Step, StubBackend

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT_TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
TOOL = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n</function>\n</tool_call>"
# What the model says, by a word of the question.
REPLIES = {
    "text": "Hello, 日本.",
    "call": "Looking. " + CALL + CALL,
    "think": "<think>I must look.</think>" + CALL,
    "cut": "<think>Well.</think>" + CALL[:60],
    "empty": "",
}


def script(prompt, request):
    question = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    text = next((text for word, text in REPLIES.items() if word in question), "Hello.")
    for start in range(0, len(text), 5):
        yield Step((text[start : start + 2], text[start + 2 : start + 5]))
    if "break" in question:
        yield Step((), error="out of pages")


@pytest.fixture(scope="module")
def client():
    with running(StubBackend(script)) as server, connect(server) as client:
        yield client


@pytest.fixture(params=[*REPLIES, "length", "break"])
def question(request):
    return request.param


def events_of(response):
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


def chat_body(question):
    limit = {"max_tokens": 2} if question == "length" else {}
    return {"messages": [{"role": "user", "content": question}], "tools": [CHAT_TOOL], **limit}


def response_body(question):
    limit = {"max_output_tokens": 2} if question == "length" else {}
    limit |= {"include": ["reasoning.encrypted_content"]} if question == "think" else {}
    limit |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2} if question == "text" else {}
    limit |= {"reasoning": {"summary": "auto"}} if question == "cut" else {}
    limit |= {"tool_choice": {"type": "function", "name": "get_weather"}} if question == "cut" else {}
    return {"input": question, "tools": [TOOL], **limit}


def message_body(question):
    limit = {"max_tokens": 2 if question == "length" else 999}
    tool = {"name": "get_weather", "input_schema": SCHEMA}
    return {"model": "stub", "messages": [{"role": "user", "content": question}], "tools": [tool], **limit}


def check_error(body):
    """An error in OpenAI's format, with the four fields that its type has."""
    types = pytest.importorskip("openai.types")
    check_type(types.ErrorObject, body["error"])
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}


def check_reply(kind, response):
    """A reply of this type, or an error."""
    if response.status_code < 400:
        check_type(kind, response.json())
    else:
        check_error(response.json())


def test_chats(client, question):
    types = pytest.importorskip("openai.types.chat")
    body = {**chat_body(question), "logprobs": True, "top_logprobs": 2}
    whole = client.post("/v1/chat/completions", json=body)
    assert whole.status_code == (500 if question == "break" else 200)
    check_reply(types.ChatCompletion, whole)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events_of(client.post("/v1/chat/completions", json={**body, **options}))
    assert ("error" in chunks[-1]) == (question == "break")
    for chunk in chunks:
        check_error(chunk) if "error" in chunk else check_type(types.ChatCompletionChunk, chunk)


def test_completions(client, question):
    types = pytest.importorskip("openai.types")
    body = {"prompt": question, "logprobs": 2, "max_tokens": 9}
    check_reply(types.Completion, client.post("/v1/completions", json=body))
    for chunk in events_of(client.post("/v1/completions", json={**body, "stream": True})):
        if "error" in chunk:
            check_error(chunk)
            continue
        choice = chunk["choices"][0]
        choice["finish_reason"] = choice["finish_reason"] or "stop"  # null in all but the last, which has no type
        check_type(types.Completion, chunk)


def test_models(client):
    openai = pytest.importorskip("openai.types")
    models = client.get("/v1/models").json()
    assert len(models["data"]) == 1
    check_type(openai.Model, models["data"][0])
    check_type(openai.Model, client.get("/v1/models/stub").json())
    anthropic = pytest.importorskip("anthropic.types")
    # Strict types have no dates as text, which is all that JSON has.
    anthropic.ModelInfo.model_validate_json(json.dumps(models["data"][0]), strict=True)
    assert (models["has_more"], models["first_id"], models["last_id"]) == (False, "stub", "stub")


def test_embeddings(client):
    types = pytest.importorskip("openai.types")
    body = {"model": "stub", "input": ["text", "another text"]}
    check_type(types.CreateEmbeddingResponse, client.post("/v1/embeddings", json=body).json())


def test_responses(client, question):
    types = pytest.importorskip("openai.types.responses")
    body = response_body(question)
    whole = client.post("/v1/responses", json=body)
    check_reply(types.Response, whole)
    if question != "break":
        response = whole.json()
        check_type(types.Response, client.get(f"/v1/responses/{response['id']}").json())
        items = client.get(f"/v1/responses/{response['id']}/input_items").json()
        check_type(types.ResponseItemList, items)
        returned = [{"role": "user", "content": question}, *response["output"], {"role": "user", "content": "go on"}]
        listed = client.post("/v1/responses", json={"input": returned}).json()
        check_type(types.ResponseItemList, client.get(f"/v1/responses/{listed['id']}/input_items").json())
    events = events_of(client.post("/v1/responses", json={**body, "stream": True}))
    assert len(events) > 2
    for event in events:
        check_type(types.ResponseStreamEvent, event)


def test_compaction_and_counts(client):
    types = pytest.importorskip("openai.types.responses")
    compacted = client.post("/v1/responses/compact", json={"model": "stub", "input": "text"}).json()
    check_type(types.CompactedResponse, compacted)
    count = client.post("/v1/responses/input_tokens", json={"input": "text"}).json()
    check_type(types.InputTokenCountResponse, count)


def test_messages(client, question):
    types = pytest.importorskip("anthropic.types")
    body = message_body(question)
    whole = client.post("/v1/messages", json=body)
    if question == "break":
        check_type(types.shared.ErrorResponse, whole.json())
    else:
        check_type(types.Message, whole.json())
    events = events_of(client.post("/v1/messages", json={**body, "stream": True}))
    assert len(events) > 2
    for event in events:
        if event["type"] == "error":
            check_type(types.shared.ErrorResponse, event)
        elif event["type"] != "ping":
            check_type(types.RawMessageStreamEvent, event)
    count = client.post("/v1/messages/count_tokens", json={"model": "stub", "messages": body["messages"]})
    check_type(types.MessageTokensCount, count.json())


PATHS = [
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/v1/messages/count_tokens"),
    *("/v1/responses", "/v1/responses/compact", "/v1/responses/input_tokens", "/v1/messages"),
]
ASK = {"messages": [{"role": "user", "content": "x"}], "input": "x", "prompt": "x", "max_tokens": 9}
BAD_BODIES = {  # each with the status of its reply
    "no JSON": (400, b"{"),
    "no object": (400, b"[]"),
    "an empty object": (400, b"{}"),
    "wrong types": (400, b'{"model": 1, "messages": 2, "input": 3, "prompt": {}, "max_tokens": "x"}'),
    "another model": (404, json.dumps({"model": "other", **ASK}).encode()),
    "too large": (413, b'{"model": "' + b"x" * 70_000 + b'"}'),
}


@pytest.fixture(scope="module")
def guarded():
    with running(StubBackend(script), api_key="secret", max_body_bytes=65_536) as server, connect(server) as client:
        yield client


def check_error_of(path, response, status):
    assert response.status_code == status, response.text
    if path.startswith("/v1/messages"):
        types = pytest.importorskip("anthropic.types")
        body = response.json()
        if status == 413:  # the documentation of the API has this type, the package's types do not
            assert body["error"]["type"] == "request_too_large"
            body["error"]["type"] = "invalid_request_error"
        check_type(types.shared.ErrorResponse, body)
    else:
        check_error(response.json())


@pytest.mark.parametrize("path", PATHS)
def test_errors_of_requests(guarded, path):
    key = {"authorization": "Bearer secret", "content-type": "application/json"}
    for status, content in BAD_BODIES.values():
        if path == "/tokenize" and status == 404:
            continue  # it ignores the model
        check_error_of(path, guarded.post(path, content=content, headers=key), status)
    no_type = {**key, "content-type": "text/plain"}
    check_error_of(path, guarded.post(path, content=b"{}", headers=no_type), 400)
    check_error_of(path, guarded.post(path, content=b"{}", headers={**key, "authorization": "Bearer x"}), 401)
    check_error_of(path, guarded.put(path, content=b"{}", headers=key), 405)


def test_errors_of_paths(guarded):
    key = {"authorization": "Bearer secret"}
    for path in ("/v1/responses/resp_0", "/v1/responses/resp_0/input_items", "/v1/models/other", "/v1/files", "/none"):
        check_error_of(path, guarded.get(path, headers=key), 404)
    check_error_of("", guarded.delete("/v1/responses/resp_0", headers=key), 404)
    check_error_of("/v1/messages/batches", guarded.get("/v1/messages/batches", headers=key), 404)


def test_errors_of_a_foreign_host_and_of_a_server_that_is_busy_or_shuts_down():
    backend = StubBackend(script)
    with running(backend) as server, connect(server) as client:
        service = server.config.app.state.service
        for path, body in (("/v1/chat/completions", chat_body("text")), ("/v1/messages", message_body("text"))):
            check_error_of(path, client.post(path, json=body, headers={"host": "example.org"}), 403)
            service.is_draining = True
            check_error_of(path, client.post(path, json=body), 503)
            service.is_draining = False
            backend.is_healthy = False
            check_error_of(path, client.post(path, json=body), 503)
            backend.is_healthy = True
