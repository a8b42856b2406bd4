"""What other servers accept and answer: unknown fields, synonyms, request ids, HEAD, aliases, prefill, embeddings."""

import base64
import json
import struct

import httpx
import pytest
import torch
from server_thread import connect, running
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.core.errors import DataError
from openmimo.core.records import SamplingParams
from openmimo.data.chat.template import encode_chat, render
from openmimo.engine.config import EngineConfig
from openmimo.engine.llm import LLM
from openmimo.engine.server.backends.engine import EngineBackend
from openmimo.engine.server.backends.stub import Step, StubBackend
from openmimo.model.context import PackedContext

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello there"}]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "get_time"}}
WARNING = "x-openmimo-warning"


@pytest.fixture(scope="module")
def backend():
    return StubBackend()


@pytest.fixture(scope="module")
def client(backend):
    with running(backend, model_aliases=("gpt-4o", "org/other")) as server, httpx.Client(base_url=server.url) as client:
        yield client


UNKNOWN = {
    "maxTokens2": {**HELLO, "maxTokens2": 5},
    "stream_options.token-details": {**HELLO, "stream": True, "stream_options": {"token-details": True}},
    "tools[].function.extra": {**HELLO, "tools": [
        {**tool, "function": {**tool["function"], "extra": 1}} for tool in (WEATHER, TIME)]},
    "chat_template_kwargs.custom": {**HELLO, "chat_template_kwargs": {"custom": 1}},
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), UNKNOWN.items(), ids=UNKNOWN)
def test_unknown_fields_are_ignored_and_reported_or_rejected_by_name(client, path, body):
    response = client.post(CHAT, json=body)
    assert response.status_code == 200
    assert response.headers[WARNING] == f"ignored fields: {path}"
    assert f'openmimo_ignored_fields_total{{field="{path}"}} 1.0' in client.get("/metrics").text
    with running(StubBackend(), strict=True) as server:
        response = httpx.post(server.url + CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].replace("[0]", "[]") == path
    assert response.json()["error"]["code"] == "unknown_parameter"


def test_harmless_fields_and_nulls_are_accepted_without_a_word():
    body = {
        **HELLO,
        "tools": [{**WEATHER, "cache_control": {"type": "ephemeral"}}],
        "verbosity": "low",
        "prediction": {"type": "content", "content": "x"},
        "top_k": -1,
        "functions": None,
        "function_call": None,
        "anything": None,
        "reasoning_effort": "max",
    }
    backend = StubBackend()
    with running(backend, strict=True) as server:
        response = httpx.post(server.url + CHAT, json=body)
    assert response.status_code == 200 and WARNING not in response.headers
    assert backend.requests[-1].params.top_k == 0


def test_many_or_strange_unknown_fields_cost_one_short_header(client):
    body = {"prompt": "x", "bad\r\nname: \u2603": 1, **{f"x{i}": 1 for i in range(100_000)}}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200
    listed = response.headers[WARNING].removeprefix("ignored fields: ").split(", ")
    assert listed[:2] == ["bad%0D%0Aname%3A%20%E2%98%83", "x0"] and listed[-1] == "..." and len(listed) == 17
    assert client.get("/metrics").text.count("openmimo_ignored_fields_total{") <= 65


def test_limits_above_the_servers_are_lowered():
    backend = StubBackend()
    with running(backend, max_tokens=7) as server, httpx.Client(base_url=server.url) as client:
        for body in ({"max_tokens": 5}, {"max_tokens": 10**6}, {"max_completion_tokens": 10**6}):
            assert client.post(CHAT, json={**HELLO, **body}).status_code == 200
        assert client.post("/v1/responses", json={"input": "x", "max_output_tokens": 10**6}).status_code == 200
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 10**6}).status_code == 200
    assert [request.params.max_tokens for request in backend.requests] == [5, 7, 7, 7, 7]


def test_requests_have_ids(client):
    assert client.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for given in ({}, {"X-Request-Id": "x" * 1000}, {"X-Request-Id": "a b"}):
        made = client.post(CHAT, json=[], headers=given).headers["x-request-id"]
        assert made.startswith("req_") and len(made) < 40
    assert client.get("/nothing").headers["x-request-id"] != client.get("/nothing").headers["x-request-id"]


def test_head_and_version_and_ping(client):
    for path in ("/health", "/ping", "/metrics", "/version", "/v1/models", "/"):
        response = client.head(path)
        assert (response.status_code, response.content) == (200, b""), path
    assert client.head(CHAT).status_code == 405
    assert set(client.get("/version").json()) == {"version"}


def test_a_model_has_aliases(client):
    listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert listed == ["stub", "gpt-4o", "org/other"]
    assert client.get("/v1/models/org/other").json()["root"] == "stub"
    for name, status in (("gpt-4o", 200), ("stub", 200), ("gpt-5", 404)):
        assert client.post(CHAT, json={**HELLO, "model": name}).status_code == status
    with running(StubBackend(), model_aliases=("*",)) as server:
        assert httpx.post(server.url + CHAT, json={**HELLO, "model": "anything"}).status_code == 200
        assert len(httpx.get(server.url + "/v1/models").json()["data"]) == 1


def test_the_scheme_of_a_key_has_no_case():
    with running(StubBackend(), api_key="Secret") as server, httpx.Client(base_url=server.url) as client:
        for given, status in (("bearer Secret", 200), ("BEARER Secret", 200), ("bearer secret", 401), ("Secret", 401)):
            assert client.get("/v1/models", headers={"Authorization": given}).status_code == status, given


def test_tool_choice_of_other_apis(client, backend):
    tools = {**HELLO, "tools": [WEATHER, TIME]}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "get_time"}}]}}  # fmt: skip
    assert client.post(CHAT, json={**tools, "tool_choice": allowed}).status_code == 200
    prompt = backend.tokenizer.decode(backend.requests[-1].prompt_token_ids, skip_special=False)
    assert "get_time" in prompt and "get_weather" not in prompt
    assert client.post(CHAT, json={**tools, "tool_choice": "any"}).status_code == 200
    prompt = backend.tokenizer.decode(backend.requests[-1].prompt_token_ids, skip_special=False)
    assert prompt.endswith("<tool_call>\n<function=")


# --- the last message goes on ----------------------------------------------------------------------------------------

PREFILL = [*HELLO["messages"], {"role": "assistant", "content": "The answer <|im_end|> is "}]


def test_a_reply_continues_the_last_message(client, backend):
    body = {"messages": PREFILL, "continue_final_message": True, "add_generation_prompt": False}
    assert client.post(CHAT, json=body).status_code == 200
    ids = list(backend.requests[-1].prompt_token_ids)
    assert client.post("/tokenize", json=body).json()["tokens"] == ids
    whole = encode_chat(backend.tokenizer, PREFILL, add_generation_prompt=False)
    assert ids == whole[:-1] and whole[-1] == backend.tokenizer.id_of("<|im_end|>")
    closed = client.post("/tokenize", json={"messages": PREFILL, "add_generation_prompt": False}).json()["tokens"]
    assert closed == whole


@pytest.mark.parametrize("messages", [HELLO["messages"], [{"role": "assistant", "tool_calls": [
    {"function": {"name": "f", "arguments": "{}"}}]}]])  # fmt: skip
def test_only_a_text_of_the_assistant_can_go_on(client, messages):
    response = client.post(CHAT, json={"messages": messages, "continue_final_message": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_a_template_that_leaves_out_the_last_message_is_no_silent_mistake():
    tokenizer = StubBackend().tokenizer
    tokenizer._chat_template = "{{ messages[0].content }}"
    assert render(PREFILL, template=tokenizer.chat_template) == "hello there"
    with pytest.raises(DataError, match="cannot be continued"):
        encode_chat(tokenizer, PREFILL, continue_final_message=True)


SETS = {
    "type": "object",
    "properties": {
        "sizes": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
        "inner": {"anyOf": [{"$ref": "#/$defs/Inner"}, {"type": "null"}]},
    },
    "$defs": {"Inner": {"additionalProperties": {"type": "array", "uniqueItems": True, "items": {"type": "array"}}}},
}
FEW = {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b"]}}


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ('{"sizes": [1, 2], "inner": {"x": [[1], [1, 2]]}}', ""),
        ('{"sizes": [1, 2, 1], "inner": {"x": [[1], [2], [1]], "y": [[1]]}}', "repeated items: sizes, inner.x"),
        ('{"sizes": [1, 1', ""),
        ('{"sizes": ' + "[" * 2000 + "]" * 2000 + "}", ""),
    ],
    ids=["different", "repeated", "cut", "deep"],
)
def test_repeated_items_that_no_grammar_can_forbid_are_reported(text, repeated):
    form = {"type": "json_schema", "schema": SETS}
    asks = {
        CHAT: {**HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SETS}}},
        "/v1/responses": {"input": "x", "text": {"format": {**form, "name": "s"}}},
        "/v1/messages": {**HELLO, "model": "stub", "max_tokens": 9000, "output_config": {"format": form}},
    }
    backend = StubBackend(lambda prompt, request: [Step((text,))], max_positions=20_000)
    with running(backend) as server, connect(server) as client:
        for path, body in asks.items():
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
            found, _, ignored = response.headers[WARNING].rpartition("ignored fields: ")
            assert found.removesuffix("; ") == repeated and "sizes.uniqueItems" in ignored


def test_lists_of_few_values_need_no_warning(client):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": FEW}}
    assert WARNING not in client.post(CHAT, json={**HELLO, "response_format": form}).headers


# --- on a real engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("model"))
    llm = LLM(folder, engine=EngineConfig(prefill_tokens=16))
    backend = EngineBackend(llm.engine, llm.tokenizer, model_name="tiny")
    with running(backend) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        yield client, LLM(folder)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_states(served, pooling):
    client, llm = served
    texts = ["x", "def add(a, b):", "The quick brown fox jumps over the lazy dog. " * 3]
    body = {"input": texts, "pooling": pooling, "encoding_format": "float"}
    for _ in range(2):  # the second time, the engine has the prefixes in its cache
        answer = client.post("/v1/embeddings", json=body).json()
    for text, entry in zip(texts, answer["data"], strict=True):
        states = _final_states(llm, llm.tokenizer.encode(text))
        expected = states.mean(dim=0) if pooling == "mean" else states[-1]
        expected = expected / expected.norm()
        assert entry["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(len(llm.tokenizer.encode(text)) for text in texts)
    encoded = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    values = struct.unpack(f"<{len(states[0])}f", base64.b64decode(encoded))
    assert values == pytest.approx(answer["data"][0]["embedding"], abs=1e-6)
    ids = [llm.tokenizer.encode(text) for text in texts]
    assert client.post("/v1/embeddings", json={**body, "input": ids}).json()["data"] == answer["data"]
    wrong = client.post("/v1/embeddings", json={**body, "dimensions": 3})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "dimensions")


def _final_states(llm, ids):
    with torch.inference_mode():
        return llm.model(torch.tensor(ids), PackedContext((len(ids),), device="cpu")).post_norm_TD.double()


def test_more_inputs_than_replies_are_embedded_in_turns():
    backend = StubBackend()
    with running(backend, max_choices=4) as server:
        inputs = [[index + 1] for index in range(10)]
        answer = httpx.post(server.url + "/v1/embeddings", json={"input": inputs}).json()
    assert [entry["index"] for entry in answer["data"]] == list(range(10))
    assert answer["data"][3]["embedding"] == [0.0, 0.0, 1.0]  # token 4 in the stub's three bits


def test_logprobs_of_responses_are_those_of_chats(served):
    client, _ = served
    ask = {"temperature": 0, "top_logprobs": 3}
    chat = client.post(CHAT, json={**HELLO, **ask, "max_tokens": 12, "logprobs": True}).json()["choices"][0]
    include = ["message.output_text.logprobs"]
    body = {"input": HELLO["messages"], **ask, "max_output_tokens": 12, "include": include}
    (item,) = client.post("/v1/responses", json=body).json()["output"]
    (part,) = item["content"]
    assert part["text"] == chat["message"]["content"]
    for entry, expected in zip(part["logprobs"], chat["logprobs"]["content"], strict=True):
        assert entry["bytes"] == expected["bytes"]
        tops = [[one["logprob"] for one in each["top_logprobs"]] for each in (entry, expected)]
        assert tops[0] == pytest.approx(tops[1], abs=1e-5)  # the second request finds its prompt in the cache


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_prompt_logprobs_are_those_of_the_model(served, path):
    client, llm = served
    body = {**HELLO, "max_tokens": 1, "prompt_logprobs": 3, "return_token_ids": True, "temperature": 0}
    if path == "/v1/completions":
        body = {**body, "prompt": "The quick brown fox"}
        del body["messages"]
    answer = client.post(path, json=body).json()
    owner = answer["choices"][0] if path == "/v1/completions" else answer
    ids, entries = owner["prompt_token_ids"], owner["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(ids)
    expected = llm.score(ids).tolist()
    for token_id, entry, logprob in zip(ids[1:], entries[1:], expected, strict=True):
        assert entry[str(token_id)]["logprob"] == pytest.approx(logprob, abs=1e-5)
        ranks = sorted((one["rank"], -one["logprob"]) for one in entry.values() if one["rank"])
        assert [rank for rank, _ in ranks] == [1, 2, 3] and ranks == sorted(ranks, key=lambda pair: pair[1])
        assert entry[str(token_id)]["decoded_token"] == llm.tokenizer.decode([token_id], skip_special=False)


TEXT = "Größe: 日本語, é and x = 10"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_an_echoed_prompt(served, stream):
    client, llm = served
    body = {"prompt": TEXT, "max_tokens": 40, "temperature": 0, "logprobs": 5, "echo": True, "ignore_eos": True}
    if stream:
        lines = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n")
        parts = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
        text = "".join(part["text"] for part in parts)
        columns = {
            name: [entry for part in parts if part["logprobs"] for entry in part["logprobs"][name]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
    else:
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
        text, columns = choice["text"], choice["logprobs"]
    num_prompt = len(llm.tokenizer.encode(TEXT))
    assert text.startswith(TEXT) and len(columns["tokens"]) == num_prompt + 40
    assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
    rows = list(zip(*columns.values(), strict=True))[1:]
    for index, (token, logprob, top, offset) in enumerate(rows):
        assert top[token] == logprob and len(top) in (5, 6)
        assert (len(top) == 5) == (logprob >= sorted(top.values())[-5])
        if index >= num_prompt - 1:
            assert max(top.values()) == logprob  # greedy: equal bit by bit
        if token.startswith("bytes:"):
            fragment = bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
            assert fragment in text[offset].encode() or text[offset] == "\ufffd"
        elif not token.startswith("<|"):
            assert text[offset:].startswith(token)
    assert any(token.startswith("bytes:") for token in columns["tokens"][:num_prompt])


def test_greedy_prompt_tokens_are_recognized(served):
    client, llm = served
    body = {"prompt": "The quick", "max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    score = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    columns = client.post("/v1/completions", json=score).json()["choices"][0]["logprobs"]
    start = len(choice["prompt_token_ids"])
    pairs = list(zip(columns["token_logprobs"], columns["top_logprobs"], strict=True))
    assert all(logprob == max(top.values()) for logprob, top in pairs[start:])
    expected = llm.score(ids).tolist()
    assert columns["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-5)


def test_the_tokenizer_describes_itself(served):
    client, llm = served
    info = client.get("/tokenizer_info").json()
    assert info["chat_template"] == llm.tokenizer.chat_template and info["bos_token"] is None
    for name in ("eos_token", "pad_token"):
        assert client.post("/tokenize", json={"prompt": info[name]}).json()["tokens"] == [
            llm.tokenizer.id_of(info[name])
        ]


def test_the_python_api_returns_likeliest_prompt_tokens_and_embeddings(served):
    _, llm = served
    params = SamplingParams(max_tokens=1, prompt_logprobs=True, prompt_top_logprobs=2, pooling="last")
    completion = llm.generate("The quick", params)[0]
    assert [len(top) for top in completion.prompt_top_logprobs] == [2] * len(completion.prompt_logprobs)
    states = _final_states(llm, completion.prompt_token_ids)
    assert completion.embedding == pytest.approx(states[-1].tolist(), abs=1e-5)


def test_too_many_prompt_logprobs_are_rejected(client):
    body = {"prompt": [[5] * 4000] * 60, "max_tokens": 1, "echo": True, "logprobs": 20}
    response = client.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
