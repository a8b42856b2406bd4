"""The input items of a response as a conversation in the form that templates take, and as items that clients list."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import TypeAdapter

from openmimo.engine.server.chat.assistant import add_call, add_content, add_reasoning
from openmimo.engine.server.http.errors import invalid
from openmimo.engine.server.openai.responses.output import new_id
from openmimo.engine.server.openai.responses.schema import (
    CompactionItem,
    CustomCallItem,
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    ItemReference,
    MessageItem,
    ReasoningItem,
    SkippedItem,
    TextPart,
    parts_text,
)
from openmimo.engine.server.openai.responses.sealed import unseal

_ITEM: TypeAdapter[InputItem] = TypeAdapter(InputItem)
_SUMMARY = "Summary of the conversation so far:\n\n"


def input_items(given: str | Sequence[InputItem], find_item: Callable[[str], InputItem | None]) -> list[InputItem]:
    """Return the items of a request's input. References are replaced by the stored items.

    Raises ApiError for a reference to an item that is not stored.
    """
    if isinstance(given, str):
        return [MessageItem(role="user", content=given)]
    items: list[InputItem] = []
    for index, item in enumerate(given):
        if isinstance(item, ItemReference):
            found = find_item(item.id)
            if found is None:
                message = f"Item with id {item.id!r} not found: the response that contains it is not stored."
                raise invalid(message, f"input[{index}].id", code="item_not_found")
            items.append(found)
        elif not isinstance(item, SkippedItem):
            items.append(item)
    return items


def as_input(output: Iterable[dict[str, Any]]) -> list[InputItem]:
    """Convert output items of a response to input items of the next one."""
    return [_ITEM.validate_python(item) for item in output]


def check_outputs(items: Sequence[InputItem], *, first: int) -> None:
    """Raise ApiError if one of the items from `first` on is the output of a call that no earlier item makes."""
    calls = set()
    for index, item in enumerate(items):
        if isinstance(item, FunctionCallItem | CustomCallItem):
            calls.add(item.call_id)
        elif isinstance(item, FunctionOutputItem) and index >= first and item.call_id not in calls:
            message = f"No tool call with call_id {item.call_id!r} precedes this output."
            raise invalid(message, f"input[{index - first}].call_id")


def num_characters(items: Iterable[InputItem]) -> int:
    """Return the length of the texts of items."""
    return sum(len(text) for item in items for text in _texts(item))


def _texts(item: InputItem) -> tuple[str, ...]:
    match item:
        case ReasoningItem():
            return parts_text(item.content), parts_text(item.summary), item.encrypted_content or ""
        case FunctionCallItem():
            return item.name, item.arguments
        case CustomCallItem():
            return item.name, item.input
        case FunctionOutputItem():
            return (parts_text(item.output),)
        case MessageItem():
            return (parts_text(item.content),)
        case CompactionItem():
            return (item.encrypted_content,)
    return ()


def messages_of(items: Iterable[InputItem], instructions: str | None) -> list[dict[str, Any]]:
    """Convert items to the form that templates take. Consecutive items of the model become one turn."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for item in items:
        _append(turns, item)
    return turns


def _append(turns: list[dict[str, Any]], item: InputItem) -> None:
    match item:
        case ReasoningItem():
            add_reasoning(turns, _reasoning(item))
        case FunctionCallItem():
            add_call(turns, item.call_id, item.name, item.arguments)
        case CustomCallItem():
            add_call(turns, item.call_id, item.name, json.dumps({"input": item.input}, ensure_ascii=False))
        case FunctionOutputItem():
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": parts_text(item.output)})
        case MessageItem(role="assistant"):
            add_content(turns, parts_text(item.content))
        case MessageItem():
            role = "system" if item.role == "developer" else item.role
            turns.append({"role": role, "content": parts_text(item.content)})
        case CompactionItem():
            turns.extend({"role": "user", "content": text} for text in item.kept)
            turns.append({"role": "user", "content": _SUMMARY + item.summary})


def _reasoning(item: ReasoningItem) -> str:
    return parts_text(item.content) or unseal(item.encrypted_content or "") or parts_text(item.summary)


def listed(item: InputItem) -> dict[str, Any]:
    """Return an item in the form of GET /v1/responses/{id}/input_items, with an id of its own."""
    match item:
        case MessageItem():
            return {
                "id": new_id("msg"),
                "type": "message",
                "role": item.role,
                "status": "completed",
                "content": _listed_parts(item),
            }
        case ReasoningItem():
            content = [{"type": "reasoning_text", "text": _reasoning(item)}]
            return {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": content}
        case FunctionCallItem():
            return {"id": new_id("fc"), "status": "completed", **item.model_dump()}
        case CustomCallItem():
            return {"id": new_id("ctc"), **item.model_dump()}
        case FunctionOutputItem():
            output = parts_text(item.output)
            return {"id": new_id("fco"), "status": "completed", **item.model_dump(), "output": output}
        case _:
            return {"id": new_id("item"), **item.model_dump()}


def _listed_parts(item: MessageItem) -> list[dict[str, Any]]:
    is_output = item.role == "assistant"
    extra: dict[str, Any] = {"annotations": [], "logprobs": []} if is_output else {}
    content = [TextPart(type="text", text=item.content)] if isinstance(item.content, str) else item.content or []
    return [{"type": "output_text" if is_output else "input_text", "text": part.text, **extra} for part in content]
