"""Conversion of a request of the Responses API to a `ChatTask`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from openmimo.core.records import Request, Structure
from openmimo.engine.server.chat.task import ChatTask, FieldNames, PreparedChat, prepare_chat
from openmimo.engine.server.chat.tools import ToolPolicy, selected_tools, tool_policy
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.errors import ApiError, invalid
from openmimo.engine.server.http.service import Service
from openmimo.engine.server.openai.conversation import template_options
from openmimo.engine.server.openai.responses.input import (
    as_input,
    check_outputs,
    input_items,
    listed,
    messages_of,
    num_characters,
)
from openmimo.engine.server.openai.responses.schema import (
    AllowedTools,
    InputItem,
    OtherTool,
    ResponseRequest,
    ResponseTool,
    SkippedItem,
)
from openmimo.engine.server.openai.responses.store import ResponseStore, StoredResponse, estimated_bytes
from openmimo.engine.server.openai.sampling import sampling_params, structure_field, structure_of
from openmimo.engine.server.openai.schema import JsonSchemaFormat, ResponseFormat


@dataclass(frozen=True)
class Conversation:
    """The items of a request.

    Attributes:
        previous: The response that the request continues.
        new: The items of the request itself.
    """

    previous: StoredResponse | None
    new: Sequence[InputItem]

    @property
    def items(self) -> list[InputItem]:
        """All items in order."""
        return [*(self.previous.conversation if self.previous else ()), *self.new]


def checked_size(service: Service, conversation: Conversation) -> int:
    """Return the length of the texts of a conversation.

    Raises ApiError if it is longer than the largest request body, or has more items than a request. Stored responses
    and references could otherwise make a conversation of any size from small requests.
    """
    previous = conversation.previous
    num_items = len(conversation.new) + (len(previous.conversation) if previous else 0)
    if num_items > limits.MESSAGES:
        raise invalid(f"The conversation has {num_items} items; at most {limits.MESSAGES} are allowed.", "input")
    size = num_characters(conversation.new) + (previous.num_characters if previous else 0)
    if size > service.config.max_body_bytes:
        message = f"The conversation has {size} characters; at most {service.config.max_body_bytes} are allowed."
        raise invalid(message, "input", code="context_length_exceeded")
    return size


def conversation_of(
    store: ResponseStore,
    owner: object | None,
    *,
    previous_response_id: str | None,
    given: str | Sequence[InputItem] | None,
) -> Conversation:
    """Look up the response that a request continues and the items that it refers to.

    Args:
        store: The stored responses.
        owner: The WebSocket connection of the request, if any.
        previous_response_id: The field of the request.
        given: The request's input.

    Raises:
        ApiError: A response or an item is not stored, or an output has no call.
    """
    previous = None
    if previous_response_id is not None:
        previous = store.get(previous_response_id, owner)
        if previous is None:
            message = f"Previous response with id {previous_response_id!r} not found."
            raise invalid(message, "previous_response_id", code="previous_response_not_found")

    def find_item(item_id: str) -> InputItem | None:
        item = store.find_item(item_id, owner)
        return None if item is None else as_input([item])[0]

    conversation = Conversation(previous, input_items(given or [], find_item))
    if previous is not None:
        check_outputs(conversation.items, first=len(previous.conversation))
    return conversation


@dataclass(frozen=True)
class PreparedResponse:
    """A request ready for the engine, and for the store.

    Attributes:
        chat: The prompt and the engine request.
        conversation: The items of the request.
        input_items: The request's own items, as clients list them.
        num_characters: Length of the conversation's texts.
        num_bytes: Estimated size in memory.
    """

    chat: PreparedChat
    conversation: Conversation
    input_items: Sequence[dict[str, Any]]
    num_characters: int
    num_bytes: int


def prepare_response(
    service: Service, body: ResponseRequest, conversation: Conversation, *, num_bytes: int
) -> PreparedResponse:
    """Convert a request to a checked engine request. Raises ApiError; runs in a worker thread.

    Args:
        service: The service.
        body: The request.
        conversation: The items of the request.
        num_bytes: Size of the request's JSON.
    """
    task, size = response_task(service, body, conversation)
    chat = _prepare_truncated(service, task) if body.truncation == "auto" else prepare_chat(service, task)
    own_items = [listed(item) for item in conversation.new]
    # The request is kept parsed and as clients list it.
    in_memory = estimated_bytes(size + 2 * num_bytes, len(conversation.items))
    return PreparedResponse(chat, conversation, own_items, size, in_memory)


def response_task(service: Service, body: ResponseRequest, conversation: Conversation) -> tuple[ChatTask, int]:
    """Return the task of a request, and the length of its conversation's texts. Raises ApiError as `checked_size`."""
    size = checked_size(service, conversation)
    effort = body.reasoning.effort if body.reasoning else None
    limit = min(body.max_output_tokens or service.config.max_tokens, service.config.max_tokens)
    task = ChatTask(
        messages=messages_of(conversation.items, body.instructions),
        params=sampling_params(
            body,
            max_tokens=limit,
            structure=_structure(body),
            logprobs=body.has_logprobs,
            top_logprobs=body.top_logprobs or 0,
        ),
        policy=_policy(body),
        options=template_options(body.chat_template_kwargs, effort, "reasoning.effort"),
        priority=body.priority or 0,
        session=body.session,
        names=FieldNames(messages="input", structure=structure_field(body, "text.format")),
    )
    return task, size


def shortest(request: Request) -> Request:
    """Return the request with the shortest reply, which reads the prompt into the prefix cache."""
    return replace(request, params=replace(request.params, max_tokens=1, min_tokens=0, structure=None))


def _policy(body: ResponseRequest) -> ToolPolicy:
    fields = {"name", "description", "parameters"}
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": tool.model_dump(exclude_none=True, include=fields)}
        for tool in functions_of(body)
    ]
    choice, parallel = body.tool_choice or "auto", body.parallel_tool_calls
    if isinstance(choice, AllowedTools):
        tools = selected_tools(tools, choice.names, "tool_choice.tools")
        return tool_policy(tools, mode=choice.mode, function=None, parallel=parallel)
    if isinstance(choice, str):
        return tool_policy(tools, mode=choice, function=None, parallel=parallel)
    return tool_policy(tools, mode="function", function=choice.name, parallel=parallel)


def functions_of(body: ResponseRequest) -> list[ResponseTool]:
    """Return the tools that the model can call."""
    return [tool for tool in body.tools or [] if isinstance(tool, ResponseTool)]


def has_structure(body: ResponseRequest) -> bool:
    """Whether a request demands a form, whose grammar may take long to compile."""
    return body.structured_outputs is not None or body.text is not None


def skipped_parts(body: ResponseRequest) -> list[str]:
    """Name the tools and the input items of a request that have no effect."""
    items = body.input if isinstance(body.input, list) else []
    tools = [
        f"tools[{index}]: {tool.type}" for index, tool in enumerate(body.tools or []) if isinstance(tool, OtherTool)
    ]
    return tools + [f"input[{index}]: {item.type}" for index, item in enumerate(items) if isinstance(item, SkippedItem)]


def _structure(body: ResponseRequest) -> Structure | None:
    text_format = body.text.format if body.text else None
    if text_format is None:
        return structure_of(body)
    schema = None if text_format.json_schema is None else JsonSchemaFormat(schema=text_format.json_schema)
    return structure_of(body, ResponseFormat(type=text_format.type, json_schema=schema))


def _prepare_truncated(service: Service, task: ChatTask) -> PreparedChat:
    """Prepare a task without as many of its oldest turns as do not fit. The last turn and system messages stay."""
    while True:
        try:
            return prepare_chat(service, task)
        except ApiError as error:
            shorter = _without_oldest(task.messages)
            if error.code != "context_length_exceeded" or len(shorter) == len(task.messages):
                raise
            task = replace(task, messages=shorter)


def _without_oldest(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the older half of the turns, so that few tries are needed, and tool results without their calls."""
    system = [turn for turn in messages if turn["role"] == "system"]
    turns = [turn for turn in messages if turn["role"] != "system"]
    rest = turns[len(turns) // 2 :]
    while len(rest) > 1 and rest[0]["role"] == "tool":
        rest = rest[1:]
    return [*system, *rest]
