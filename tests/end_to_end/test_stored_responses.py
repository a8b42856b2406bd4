"""The official openai client on stored responses, compaction and the WebSocket transport."""

import httpx
import pytest
from server_thread import running

from openmimo.engine.server.backends.stub import StubBackend

openai = pytest.importorskip("openai", reason="needs the openai client")

KEY = "a key"


@pytest.fixture(scope="module")
def server_url():
    with running(StubBackend(), api_key=KEY) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(server_url):
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_a_response_is_continued_retrieved_and_deleted(client):
    first = client.responses.create(model="stub", input="My name is Alice.")
    second = client.responses.create(model="stub", input="And mine is Bob.", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert client.responses.retrieve(second.id) == second
    items = client.responses.input_items.list(second.id)
    assert [item.content[0].text for item in items] == ["And mine is Bob."]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="stub", input="x", previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"


def test_a_conversation_is_compacted_and_counted(client):
    compacted = client.responses.compact(model="stub", input="The code word is slate.")
    items = [item.model_dump(exclude_none=True) for item in compacted.output]
    going_on = [*items, {"role": "user", "content": "Go on."}]
    count = client.responses.input_tokens.count(model="stub", input=going_on).input_tokens
    assert client.responses.create(model="stub", input=going_on).usage.input_tokens == count


def test_a_socket(client):
    pytest.importorskip("websockets", reason="needs the websockets package")
    with client.responses.connect() as connection:
        ids = []
        for text in ("code word cobalt", "which?"):
            previous = {"previous_response_id": ids[-1]} if ids else {}
            connection.response.create(model="stub", input=text, store=False, **previous)
            for event in connection:
                if event.type == "response.completed":
                    ids.append(event.response.id)
                    break
        assert len(set(ids)) == 2 and event.response.output_text == "which?"


def test_a_socket_without_the_key_is_refused(server_url):
    websockets = pytest.importorskip("websockets.sync.client", reason="needs the websockets package")
    url = server_url.replace("http://", "ws://") + "/v1/responses"
    with pytest.raises(Exception, match="401"):
        websockets.connect(url)


def test_without_an_upgrade_the_path_is_not_found(server_url):
    response = httpx.get(f"{server_url}/v1/responses", headers={"authorization": f"Bearer {KEY}"})
    assert response.status_code == 405
