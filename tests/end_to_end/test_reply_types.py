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
    limit |= {"reasoning": {"summary": "auto"}} if question == "cut" else {}
    limit |= {"tool_choice": {"type": "function", "name": "get_weather"}} if question == "cut" else {}
    return {"input": question, "tools": [TOOL], **limit}


def message_body(question):
    limit = {"max_tokens": 2 if question == "length" else 999}
    tool = {"name": "get_weather", "input_schema": SCHEMA}
    return {"model": "stub", "messages": [{"role": "user", "content": question}], "tools": [tool], **limit}


def test_chats(client, question):
    types = pytest.importorskip("openai.types.chat")
    body = {**chat_body(question), "logprobs": True, "top_logprobs": 2}
    whole = client.post("/v1/chat/completions", json=body)
    if question != "break":
        check_type(types.ChatCompletion, whole.json())
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events_of(client.post("/v1/chat/completions", json={**body, **options}))
    assert chunks
    for chunk in chunks[: -1 if question == "break" else None]:
        check_type(types.ChatCompletionChunk, chunk)


def test_completions(client, question):
    types = pytest.importorskip("openai.types")
    body = {"prompt": question, "logprobs": 2, "max_tokens": 9}
    if question != "break":
        check_type(types.Completion, client.post("/v1/completions", json=body).json())
        chunks = events_of(client.post("/v1/completions", json={**body, "stream": True}))
        for chunk in chunks:
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
    if question != "break":
        response = whole.json()
        check_type(types.Response, response)
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
