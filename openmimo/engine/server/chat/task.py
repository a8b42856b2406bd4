"""A chat request and its reply between the wire formats and the engine.

Each wire format converts its requests to a `ChatTask` and its replies from the events of `chat_events`.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from openmimo.core.records import Request, SamplingParams
from openmimo.data.chat.parser import ChatEvent
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.server.chat.prompts import ChatOptions, PromptEnding
from openmimo.engine.server.chat.tools import ToolPolicy
from openmimo.engine.server.chat.turns import ChatPrompt, ChatReply, chat_prompt
from openmimo.engine.server.http.service import Generation, Service


@dataclass(frozen=True)
class FieldNames:
    """Names of the fields of a wire format, for errors.

    Attributes:
        messages: The conversation.
        structure: The form of the reply.
    """

    messages: str = "messages"
    structure: str = "response_format"


@dataclass(frozen=True)
class ChatTask:
    """One reply to generate.

    Attributes:
        messages: The conversation, in the form that templates take.
        params: Sampling parameters; `structure` is the form that the request demands.
        policy: The tools, and the constraints on tool calls.
        options: Options of the chat template.
        ending: End of the prompt.
        priority: As in `Request`.
        session: As in `Request`.
        names: Names of the request's fields, for errors.
    """

    messages: Sequence[dict[str, Any]]
    params: SamplingParams
    policy: ToolPolicy = field(default_factory=ToolPolicy)
    options: ChatOptions = field(default_factory=ChatOptions)
    ending: PromptEnding = "new turn"
    priority: int = 0
    session: str | None = None
    names: FieldNames = field(default_factory=FieldNames)


@dataclass(frozen=True)
class PreparedChat:
    """A task with its prompt and its engine request, which the backend has checked."""

    prompt: ChatPrompt
    request: Request

    def new_reply(self, tokenizer: Tokenizer) -> ChatReply:
        """Return the reply, still without tokens."""
        return ChatReply(tokenizer, self.prompt)


def encode_task(service: Service, task: ChatTask) -> ChatPrompt:
    """Render and encode the conversation of a task. Raises ApiError; runs in a worker thread."""
    tokenizer, positions = service.backend.tokenizer, service.backend.max_positions
    return chat_prompt(
        tokenizer,
        task.messages,
        task.policy,
        task.options,
        most_tokens=positions,
        ending=task.ending,
        param=task.names.messages,
    )


def prepare_chat(service: Service, task: ChatTask) -> PreparedChat:
    """Convert a task to a checked engine request. Raises ApiError; runs in a worker thread."""
    demanded = task.params.structure
    prompt = encode_task(service, task)
    request = Request(
        id=secrets.token_hex(12),
        prompt_token_ids=prompt.token_ids,
        params=replace(task.params, structure=prompt.structure(demanded)),
        priority=task.priority,
        session=task.session,
    )
    structure_param = "tools" if demanded is None else task.names.structure
    service.check([request], param=task.names.messages, structure_param=structure_param)
    return PreparedChat(prompt, request)


async def chat_events(generation: Generation, reply: ChatReply) -> AsyncIterator[ChatEvent]:
    """Yield the events of one reply in order, and add its deltas to `reply`. Raises ApiError as `Generation.deltas`."""
    async for _, delta in generation.deltas():
        for part in reply.push(delta):
            yield part
        if reply.is_complete:
            generation.abort(0)
