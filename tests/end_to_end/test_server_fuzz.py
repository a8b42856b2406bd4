"""The server answers any request as its OpenAPI schema says, and never with a 500."""

import json
import re
import socket
import subprocess
import sys

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_thread import running

from openmimo.engine.server.app import create_app
from openmimo.engine.server.backends.stub import StubBackend
from openmimo.engine.server.config import ServerConfig

FEW = settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=50)
CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
PATHS = [
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/responses/compact", "/v1/messages",
    "/v1/messages/count_tokens", "/tokenize", "/detokenize",
]  # fmt: skip


@pytest.fixture(scope="module")
def url():
    with running(StubBackend(), request_timeout_seconds=20) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, verify=False) as client:
        yield client


@pytest.fixture(scope="module")
def schemathesis():
    """The package, imported here because that takes longer than to collect the tests of this folder."""
    return pytest.importorskip("schemathesis", reason="needs schemathesis")


@pytest.mark.slow  # test_reply_types.py and the bodies below are its fast siblings
def test_every_answer_is_one_that_the_schema_promises(url, schemathesis):
    requests = pytest.importorskip("requests", reason="needs requests")
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]
    schema = schemathesis.openapi.from_dict(create_app(StubBackend(), ServerConfig()).openapi())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 9
    with requests.Session() as session:
        session.trust_env = False  # looking for proxies takes as long as the request
        for operation in operations:

            @MANY
            @given(case=operation.as_strategy())
            def call(case):
                case.call_and_validate(base_url=url, session=session, checks=checks)

            call()


@pytest.mark.slow
def test_bodies_at_the_edges_of_the_schema(url, schemathesis, tmp_path):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--phases", "coverage"]
    ended = subprocess.run([*command, "--checks", ",".join(CHECKS)], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout
    generated, passed = re.search(r"(\d+) generated, (\d+) passed", ended.stdout).groups()
    assert int(passed) == int(generated) > 2000


# --- bodies that are almost valid -------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        "",
        "a",
        "user",
        "assistant",
        "tool",
        "function",
        "text",
        "<think>",
        "<|im_end|>",
        "</tool_call>",
        "\x00",
        "日",
        "{}",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 10**20) | st.floats() | WORDS
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3))
CALLS = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": WORDS, "arguments": WORDS | JSON})}))
BLOCKS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image", "input_text", "refusal"])},
    optional={
        "text": WORDS, "thinking": WORDS, "name": WORDS, "id": WORDS, "tool_use_id": WORDS, "input": JSON,
        "content": WORDS,
    },
)  # fmt: skip
ITEMS = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["reasoning", "function_call", "function_call_output", "custom_tool_call", "compaction", "item_reference"]
        )
    },
    optional={
        "call_id": WORDS, "name": WORDS, "arguments": WORDS, "output": WORDS, "id": WORDS, "input": WORDS,
        "content": st.lists(BLOCKS, max_size=2), "encrypted_content": WORDS,
    },
)  # fmt: skip
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": WORDS | st.none() | st.lists(BLOCKS)},
    optional={
        "reasoning_content": WORDS,
        "tool_calls": CALLS | JSON,
    },
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": st.sampled_from(["f", "g"]), "parameters": st.dictionaries(st.just("properties"), JSON) | JSON}
            ),
        }
    ),
    max_size=2,
)
BODIES = st.fixed_dictionaries(
    {
        "messages": st.lists(TURNS, max_size=4) | JSON,
        "prompt": WORDS | JSON,
        "input": WORDS | st.lists(TURNS | ITEMS, max_size=3) | JSON,
        "tokens": st.lists(st.integers(-1, 400)) | JSON,
        "model": st.just("stub"),
    },
    optional={
        "tools": TOOLS | JSON,
        "tool_choice": st.sampled_from(["none", "auto", "required", "maybe"]) | JSON,
        "stop": WORDS | JSON,
        "logit_bias": st.dictionaries(st.sampled_from(["1", "-1", "9999", "x"]), SCALARS),
        "stream": SCALARS,
        "max_tokens": SCALARS,
        "n": SCALARS,
        "seed": SCALARS,
        "logprobs": SCALARS,
        "echo": SCALARS,
        "metadata": JSON,
    },
)
FIELDS = {
    "/v1/chat/completions": {"messages"},
    "/v1/completions": {"prompt"},
    "/v1/responses": {"input"},
    "/v1/responses/compact": {"input", "model"},
    "/v1/messages": {"messages", "model", "max_tokens"},
    "/v1/messages/count_tokens": {"messages", "model"},
    "/tokenize": {"messages"},
    "/detokenize": {"tokens"},
}
PROMPT_FIELDS = set().union(*FIELDS.values())


def assert_answered(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        keys = {"message", "type"} if "/v1/messages" in str(response.url) else {"message", "type", "param", "code"}
        assert set(response.json()["error"]) == keys
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert '"error":' not in response.text.rsplit("data: ", 2)[-2]


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(body=BODIES)
def test_bodies_near_to_what_is_right(client, path, body):
    own = {name: value for name, value in body.items() if name not in PROMPT_FIELDS or name in FIELDS[path]}
    assert_answered(client.post(path, content=json.dumps(own), headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("path", PATHS)
@FEW
@given(body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_bodies_far_from_it(client, path, body):
    assert_answered(client.post(path, content=body, headers={"Content-Type": "application/json"}))


@FEW
@given(raw=st.binary(min_size=1, max_size=80))
def test_bytes_that_are_no_http(client, raw):
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + raw)
    assert client.get("/health").status_code == 200
