"""Conversion of a request of the Messages API to a `ChatTask`."""

import json
from typing import Any

from openmimo.core.records import SamplingParams, Structure
from openmimo.engine.server.anthropic.schema import (
    DocumentBlock,
    MessagesRequest,
    OtherTool,
    PromptRequest,
    SkippedBlock,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from openmimo.engine.server.chat.assistant import Turns, add_call, add_content, add_reasoning
from openmimo.engine.server.chat.prompts import ChatOptions
from openmimo.engine.server.chat.task import ChatTask, FieldNames
from openmimo.engine.server.chat.tools import ToolPolicy, tool_policy
from openmimo.engine.server.http.errors import invalid

_BLOCK_SEPARATOR = "\n\n"  # between texts of one turn; text of the model is joined without a separator
_BILLING = "x-anthropic-billing-header:"  # of Claude Code; its text differs in every request, which defeats the cache
_MODES = {"auto": "auto", "any": "required", "tool": "function", "none": "none"}


def message_task(body: MessagesRequest, *, max_tokens: int) -> ChatTask:
    """Return the task of a request, with the server's limit of new tokens."""
    given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
    form = body.form
    params = SamplingParams(
        max_tokens=min(body.max_tokens, max_tokens),
        stop=tuple(body.stop_sequences or ()),
        structure=None if form is None else Structure("json_schema", json.dumps(form.json_schema)),
        skip_special_tokens=False,
        **{name: value for name, value in given.items() if value is not None},
    )
    return prompt_task(body, params)


def prompt_task(body: PromptRequest, params: SamplingParams) -> ChatTask:
    """Return the task of a request with these sampling parameters."""
    messages = _conversation(body)
    if not any(turn["role"] != "system" for turn in messages):
        raise invalid("messages contain no text.", "messages")
    return ChatTask(
        messages=messages,
        params=params,
        policy=_policy(body),
        options=ChatOptions(thinks=_thinks(body, messages)),
        ending="open turn" if _is_begun_reply(messages[-1]) else "new turn",
        names=FieldNames(structure="output_format" if body.output_format else "output_config.format"),
    )


def _is_begun_reply(turn: dict[str, Any]) -> bool:
    """Whether a last turn is the beginning of the reply: a text of the assistant, without thinking and calls."""
    return turn["role"] == "assistant" and set(turn) == {"role", "content"}


def skipped_parts(body: PromptRequest) -> list[str]:
    """Name the tools and the blocks of a request that have no effect."""
    skipped = [
        f"tools[{index}]: {tool.type}" for index, tool in enumerate(body.tools or []) if isinstance(tool, OtherTool)
    ]
    for index, turn in enumerate(body.messages):
        blocks = turn.content if isinstance(turn.content, list) else []
        skipped += [
            f"messages[{index}].content[{number}]: {block.type}"
            for number, block in enumerate(blocks)
            if isinstance(block, SkippedBlock)
        ]
    return skipped


def _thinks(body: PromptRequest, messages: Turns) -> bool:
    kind = body.thinking.type if body.thinking else "disabled"
    if kind == "between_tools":
        return bool(messages) and messages[-1]["role"] == "tool"
    return kind != "disabled"


def _policy(body: PromptRequest) -> ToolPolicy:
    tools = [{"type": "function", "function": _function(tool)} for tool in body.tools or [] if isinstance(tool, Tool)]
    choice = body.tool_choice
    if choice is None:
        return tool_policy(tools, mode="auto", function=None, parallel=None)
    parallel = False if choice.disable_parallel_tool_use else None
    return tool_policy(tools, mode=_MODES[choice.type], function=choice.name, parallel=parallel)


def _function(tool: Tool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **described, "parameters": tool.input_schema}


def _conversation(body: PromptRequest) -> Turns:
    turns: Turns = []
    system = [body.system] if isinstance(body.system, str) else [block.text for block in body.system or ()]
    _add_texts(turns, "system", [text for text in system if not text.startswith(_BILLING)])
    for turn in body.messages:
        if turn.role == "assistant":
            _add_assistant(turns, turn)
        else:
            _add_other(turns, turn)
    return turns


def _add_assistant(turns: Turns, turn: Turn) -> None:
    if isinstance(turn.content, str):
        add_content(turns, turn.content)
        return
    for block in turn.content:
        match block:
            case ThinkingBlock():
                add_reasoning(turns, block.thinking)
            case TextBlock():
                add_content(turns, block.text)
            case ToolUseBlock():
                add_call(turns, block.id, block.name, block.input)


def _add_other(turns: Turns, turn: Turn) -> None:
    """Add a turn of the user or the system. Each tool result becomes a turn of the tool."""
    if isinstance(turn.content, str):
        _add_texts(turns, turn.role, [turn.content])
        return
    texts: list[str] = []
    for block in turn.content:
        match block:
            case TextBlock() | DocumentBlock():
                texts.append(block.text)
            case ToolResultBlock():
                _add_texts(turns, turn.role, texts)
                texts = []
                turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result_text(block)})
    _add_texts(turns, turn.role, texts)


def _add_texts(turns: Turns, role: str, texts: list[str]) -> None:
    if texts:
        turns.append({"role": role, "content": _BLOCK_SEPARATOR.join(texts)})


def _result_text(block: ToolResultBlock) -> str:
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    parts = [part.text for part in block.content if isinstance(part, TextBlock | DocumentBlock)]
    return _BLOCK_SEPARATOR.join(parts)
