"""Chat requests: a conversation to a prompt, and the deltas of a reply to the parts of a message."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openmimo.core.errors import DataError
from openmimo.core.records import Delta, Structure
from openmimo.data.chat.parser import (
    ChatEvent,
    ChatParser,
    ContentText,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from openmimo.data.tokenizer import THINK_END, THINK_START, Tokenizer
from openmimo.engine.server.chat.prompts import ChatOptions, PromptEnding, encode_messages
from openmimo.engine.server.chat.tools import CALL_MARK, ToolPolicy, reply_structure, without_opening


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation ready for the engine.

    Attributes:
        token_ids: The prompt. It ends with the policy's opening, which is the beginning of the reply.
        policy: The tools, and the constraints on tool calls.
        thinks: Whether the reply may begin with thinking.
        starts_thinking: Whether the reply begins inside `<think>`.
    """

    token_ids: tuple[int, ...]
    policy: ToolPolicy
    thinks: bool
    starts_thinking: bool

    def structure(self, form: Structure | None) -> Structure | None:
        """The structure of the reply if the request demands `form`."""
        opening = "" if self.starts_thinking else THINK_START
        thoughts = f"{opening}(.|\n)*{THINK_END}" if self.thinks or self.starts_thinking else ""
        return reply_structure(self.policy, form, thoughts=thoughts)


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    policy: ToolPolicy,
    options: ChatOptions,
    *,
    most_tokens: int,
    ending: PromptEnding = "new turn",
    param: str = "messages",
) -> ChatPrompt:
    """Render and encode a conversation in the model's chat format.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation, in the form that templates take.
        policy: The tools, and the constraints on tool calls.
        options: Options of the chat template.
        most_tokens: Maximum length of the prompt.
        ending: End of the prompt.
        param: Field of the HTTP request that contains the conversation.

    Raises:
        ApiError: The template rejects the conversation, or the prompt exceeds `most_tokens`.
    """
    ids = encode_messages(
        tokenizer, messages, policy.tools, options, most_tokens=most_tokens, ending=ending, param=param
    )
    starts_thinking = _ends_in_thought(tokenizer, ids)
    thinks = options.thinks and ending == "new turn"
    if thinks or starts_thinking:
        policy = without_opening(policy)
    if policy.opening:
        ids += tokenizer.encode(CALL_MARK, allow_special=True)
        ids += tokenizer.encode(policy.opening.removeprefix(CALL_MARK))
    return ChatPrompt(tuple(ids), policy, thinks=thinks, starts_thinking=starts_thinking)


@dataclass
class ToolCallState:
    """A tool call of a reply, possibly incomplete."""

    name: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    arguments: str = ""

    def to_message(self) -> dict[str, Any]:
        """Return the call in the form of a chat message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ChatReply:
    """One reply, built from its deltas. Reasoning, content and calls are parsed from the text.

    Attributes:
        reasoning: Text inside `<think>`.
        content: Text outside thinking and calls.
        tool_calls: The calls in order. The last may be incomplete.
        token_ids: All generated tokens.
        finish_reason: The engine's finish reason; empty while the reply is unfinished.
        stop_string: The stop string that ended the reply, or empty.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        num_reasoning_tokens: Tokens between the `<think>` marks.
        num_drafted_tokens: Tokens that were accepted drafts of MTP layers.
        is_complete: Whether to ignore further tokens: one call was allowed, and it has ended.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: ChatPrompt):
        self.reasoning = ""
        self.content = ""
        self.tool_calls: list[ToolCallState] = []
        self.token_ids: list[int] = []
        self.finish_reason = ""
        self.stop_string = ""
        self.num_cached_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_drafted_tokens = 0
        self.is_complete = False
        self._parser = ChatParser(
            tools=prompt.policy.tools,
            starts_thinking=prompt.starts_thinking,
            reads_calls=prompt.policy.reads_calls,
        )
        self._num_whole_calls = 0
        self._one_call = prompt.policy.one_call
        self._marks = (_id_of(tokenizer, THINK_START), _id_of(tokenizer, THINK_END))
        self._is_thinking = prompt.starts_thinking
        self._opening = prompt.policy.opening

    def push(self, delta: Delta) -> list[ChatEvent]:
        """Add a delta and return its events in order. After the reply is complete, there are none."""
        self._count(delta)
        events = self._parser.push(self._opening + delta.text)
        self._opening = ""
        if delta.finish_reason:
            events += self._parser.finish()
            self.finish_reason = delta.finish_reason
            self.stop_string = delta.stop_string
        added = []
        for event in events:
            if self._one_call and self.tool_calls and isinstance(event, ToolCallStart):
                self._end_early()
            if self.is_complete:
                break
            self._add(event)
            added.append(event)
        return added

    @property
    def openai_finish_reason(self) -> str:
        """OpenAI's finish reason. "repetition" becomes "length"."""
        if self.tool_calls and not self.has_open_call and self.finish_reason == "stop":
            return "tool_calls"
        return "length" if self.finish_reason == "repetition" else self.finish_reason

    @property
    def has_open_call(self) -> bool:
        """Whether the last call is incomplete, so that its arguments are not a complete JSON object."""
        return self._num_whole_calls < len(self.tool_calls)

    def message(self) -> dict[str, Any]:
        """Return the reply as a chat message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.tool_calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_message() for call in self.tool_calls]
        return message

    def _add(self, event: ChatEvent) -> None:
        match event:
            case ReasoningText():
                self.reasoning += event.text
            case ContentText():
                self.content += event.text
            case ToolCallStart():
                self.tool_calls.append(ToolCallState(event.name))
            case ToolCallArguments():
                self.tool_calls[event.index].arguments += event.text
            case ToolCallEnd():
                self._num_whole_calls += 1
                self._end_early()

    def _end_early(self) -> None:
        if self._one_call and not self.finish_reason:
            self.finish_reason = "stop"
        self.is_complete = self._one_call

    def _count(self, delta: Delta) -> None:
        self.token_ids += delta.token_ids
        self.num_drafted_tokens += sum(delta.drafted)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        for token_id in delta.token_ids:
            if token_id in self._marks:
                self._is_thinking = token_id == self._marks[0]
            else:
                self.num_reasoning_tokens += self._is_thinking


def _ends_in_thought(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether the prompt ends inside `<think>`."""
    opening, closing = _id_of(tokenizer, THINK_START), _id_of(tokenizer, THINK_END)
    last = next((token for token in reversed(ids) if token in (opening, closing)), None)
    return last is not None and last == opening


def _id_of(tokenizer: Tokenizer, mark: str) -> int | None:
    """The id of a mark, or None if it is not one token of this tokenizer."""
    try:
        return tokenizer.id_of(mark)
    except DataError:
        return None
