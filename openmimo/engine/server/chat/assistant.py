"""The assistant's turns of a conversation, built from a wire format's items in their order.

The fields of a turn have an order: reasoning, content, calls. An item whose successor exists starts a new turn.
"""

from typing import Any

Turns = list[dict[str, Any]]


def add_reasoning(turns: Turns, text: str) -> None:
    """Append reasoning to a conversation in the form that templates take."""
    _append(_turn(turns, unless=("content", "tool_calls")), "reasoning_content", text)


def add_content(turns: Turns, text: str) -> None:
    """Append text of the assistant."""
    _append(_turn(turns, unless=("tool_calls",)), "content", text)


def add_call(turns: Turns, call_id: str, name: str, arguments: str | dict[str, Any]) -> None:
    """Append a tool call. `arguments` is an object or its JSON text."""
    call = {"id": call_id, "function": {"name": name, "arguments": arguments}}
    _turn(turns).setdefault("tool_calls", []).append(call)


def _append(turn: dict[str, Any], name: str, text: str) -> None:
    turn[name] = turn.get(name, "") + text


def _turn(turns: Turns, unless: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the last turn if it is the assistant's and has no field of `unless`, otherwise a new assistant turn."""
    if not turns or turns[-1]["role"] != "assistant" or any(name in turns[-1] for name in unless):
        turns.append({"role": "assistant"})
    return turns[-1]
