"""What the compliance suite of Open Responses requires, with the types of the package openresponses-types.

The suite (bin/compliance-test.ts of the repository openresponses/openresponses) is in no package registry, so these are
checks of our own of the same 17 points. The script plays the model.
"""

import json
import time
from collections.abc import Sequence

import httpx
import openresponses_types as types
from checks import KEY, MODEL, Served, check, main
from websockets.sync.client import connect

HEADERS = {"Authorization": f"Bearer {KEY}"}
CLIENT = httpx.Client(headers=HEADERS, timeout=60, verify=False)  # no certificates: they take longer than the checks
NOT_FOUND = "previous_response_not_found"
IMAGE = "data:image/png;base64,iVBORw0KGgo="
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a place.",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
# The class of each event by the event's type.
EVENTS = {
    next(iter(kind.model_fields["type"].annotation)).value: kind
    for name, kind in vars(types).items()
    if name.endswith("StreamingEvent")
}


def message(role: str, content: object, **fields: object) -> dict:
    return {"type": "message", "role": role, "content": content, **fields}


def typed(kind: type, value: object) -> dict:
    """The value, if it has the type without any conversion."""
    kind.model_validate_json(json.dumps(value), strict=True)
    return value


def post(served: Served, path: str = "", **fields: object) -> httpx.Response:
    url = f"{served.scripted_url}/v1/responses{path}"
    return CLIENT.post(url, json={"model": MODEL, **fields})


def completed(response: dict) -> dict:
    """The response, if it has the type, is completed and has output."""
    typed(types.ResponseResource, response)
    assert response["status"] == "completed" and response["output"], response
    return response


def answer(served: Served, *items: dict, **fields: object) -> dict:
    reply = post(served, input=list(items), **fields)
    assert reply.status_code == 200, reply.text
    return completed(reply.json())


def last_of(events: Sequence[dict]) -> dict:
    """The response that a stream ends with. Every event has its type."""
    for event in events:
        typed(EVENTS[event["type"]], event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return completed(events[-1]["response"])


def socket_turns(served: Served, *bodies: dict) -> list[list[dict]]:
    """The events of each request over one connection. The text "FIRST" stands for the id of the first response."""
    turns: list[list[dict]] = []
    with connect(f"{served.scripted_url.replace('http', 'ws')}/v1/responses", additional_headers=HEADERS) as socket:
        for body in bodies:
            if body.get("previous_response_id") == "FIRST":
                body = {**body, "previous_response_id": turns[0][-1]["response"]["id"]}
            socket.send(json.dumps({"type": "response.create", "model": MODEL, **body}))
            turns.append([])
            while not turns[-1] or turns[-1][-1]["type"] not in ("response.completed", "response.failed", "error"):
                turns[-1].append(json.loads(socket.recv(timeout=60)))
    return turns


def error_code(events: Sequence[dict]) -> str:
    """The code of the only event, an error."""
    (event,) = events
    return typed(types.WebSocketErrorEvent, event)["error"]["code"]


@check("open responses: basic response")
def _(served: Served) -> None:
    answer(served, message("user", "Greet me."))


@check("open responses: phases of assistant messages in the input")
def _(served: Served) -> None:
    thought = message("assistant", "I use the number from before.", phase="commentary")
    answer(served, thought, message("assistant", "Four.", phase="final_answer"), message("user", "Which number?"))


@check("open responses: phases of assistant messages in the output have a type")
def _(served: Served) -> None:
    response = answer(served, message("user", "Greet me."))
    for phase in ("commentary", "final_answer"):
        response["output"][0]["phase"] = phase
        completed(response)


@check("open responses: streaming")
def _(served: Served) -> None:
    reply = post(served, input=[message("user", "Count to five.")], stream=True)
    data = [line.removeprefix("data: ") for line in reply.text.split("\n") if line.startswith("data: ")]
    last_of([json.loads(one) for one in data if one != "[DONE]"])


@check("open responses: system message")
def _(served: Served) -> None:
    answer(served, message("system", "Answer like a sailor."), message("user", "Greet me."))


@check("open responses: tool calling")
def _(served: Served) -> None:
    response = answer(served, message("user", "Is it cold in Oslo?"), tools=[WEATHER])
    call = next(item for item in response["output"] if item["type"] == "function_call")
    assert json.loads(call["arguments"]) == {"location": "Oslo"}


@check("open responses: image input is refused by name (the suite wants an answer)")
def _(served: Served) -> None:
    parts = [{"type": "input_text", "text": "What is this?"}, {"type": "input_image", "image_url": IMAGE}]
    reply = post(served, input=[message("user", parts)])
    error = reply.json()["error"]
    assert reply.status_code == 400 and "image" in error["message"], reply.text


@check("open responses: several turns")
def _(served: Served) -> None:
    turns = [message("user", "I am Ada."), message("assistant", "Hello Ada."), message("user", "Who am I?")]
    answer(served, *turns)


@check("open responses: WebSocket")
def _(served: Served) -> None:
    (events,) = socket_turns(served, {"input": [message("user", "Count to three.")]})
    last_of(events)


@check("open responses: WebSocket, one response after the other")
def _(served: Served) -> None:
    turns = socket_turns(served, *({"store": False, "input": text} for text in ("Say one.", "Say two.")))
    ids = {last_of(events)["id"] for events in turns}
    assert len(ids) == 2


@check("open responses: WebSocket, continuation without a store")
def _(served: Served) -> None:
    follow = {"store": False, "previous_response_id": "FIRST", "input": "And now?"}
    for events in socket_turns(served, {"store": False, "input": "Remember the word."}, follow):
        last_of(events)


@check("open responses: WebSocket, a new connection does not know responses without a store")
def _(served: Served) -> None:
    (first,) = socket_turns(served, {"store": False, "input": "Remember the word."})
    old = last_of(first)["id"]
    again = {"store": False, "previous_response_id": old, "input": "And now?"}
    missed, fresh = socket_turns(served, again, {"store": False, "input": [message("user", "Start over.")]})
    assert error_code(missed) == NOT_FOUND
    last_of(fresh)


@check("open responses: WebSocket, unknown previous response")
def _(served: Served) -> None:
    body = {"store": False, "previous_response_id": f"resp_missing_{time.time_ns()}", "input": "And now?"}
    (events,) = socket_turns(served, body)
    assert error_code(events) == NOT_FOUND


@check("open responses: WebSocket, a failed continuation drops the response")
def _(served: Served) -> None:
    output = {"type": "function_call_output", "call_id": "call_missing", "output": "There is no such call."}
    follow = {"store": False, "previous_response_id": "FIRST"}
    first, failed, retried = socket_turns(
        served,
        {"store": False, "input": "Remember the word."},
        {**follow, "input": [output]},
        {**follow, "input": "So?"},
    )
    last_of(first)
    assert failed[-1]["type"] in ("error", "response.failed")
    assert error_code(retried) == NOT_FOUND


@check("open responses: compaction")
def _(served: Served) -> None:
    turns = [message("user", "We start on Tuesday."), message("assistant", "Understood: Tuesday.")]
    reply = post(served, "/compact", prompt_cache_key="key", input=turns)
    assert reply.status_code == 200, reply.text
    compacted = typed(types.CompactResource, reply.json())
    assert compacted["object"] == "response.compaction"
    assert "compaction" in [item["type"] for item in compacted["output"]]


@check("open responses: compaction without a model")
def _(served: Served) -> None:
    body = {"input": [message("user", "Compact this.")]}
    url = f"{served.scripted_url}/v1/responses/compact"
    assert CLIENT.post(url, json=body).status_code in (400, 422)


@check("open responses: WebSocket, a new conversation from a compaction")
def _(served: Served) -> None:
    turns = [message("user", [{"type": "input_text", "text": "Remember the word."}])]
    turns.append(message("assistant", [{"type": "output_text", "text": "Yes."}]))
    output = post(served, "/compact", input=turns).json()["output"]
    (events,) = socket_turns(served, {"store": False, "input": [*output, message("user", "Go on.")], "tools": []})
    last_of(events)


main("openresponses-types")
