"""A chat request and its reply between the wire formats and the engine.

Each wire format converts its requests to a `ChatTask` and its replies from `chat_deltas`.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from openmimo.core.records import Delta, Request, SamplingParams
from openmimo.data.chat.parser import ChatEvent
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.server.chat.forms import form_warnings
from openmimo.engine.server.chat.prompts import ChatOptions, PromptEnding
from openmimo.engine.server.chat.requests import engine_requests
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
    """The next turn of a conversation, to be generated.

    Attributes:
        messages: The conversation, in the form that templates take.
        params: Sampling parameters; `structure` is the form that the request demands.
        num_choices: Number of replies to generate, each with its own seed.
        policy: The tools, and the constraints on tool calls.
        options: Options of the chat template.
        ending: End of the prompt.
        priority: As in `Request`.
        session: As in `Request`.
        names: Names of the request's fields, for errors.
    """

    messages: Sequence[dict[str, Any]]
    params: SamplingParams
    num_choices: int = 1
    policy: ToolPolicy = field(default_factory=ToolPolicy)
    options: ChatOptions = field(default_factory=ChatOptions)
    ending: PromptEnding = "new turn"
    priority: int = 0
    session: str | None = None
    names: FieldNames = field(default_factory=FieldNames)


@dataclass(frozen=True)
class PreparedChat:
    """A task with its prompt and its engine requests, one for each reply, which the backend has checked."""

    prompt: ChatPrompt
    requests: Sequence[Request]

    def new_replies(self, tokenizer: Tokenizer) -> list[ChatReply]:
        """Return the replies, still without tokens."""
        return [ChatReply(tokenizer, self.prompt) for _ in self.requests]

    def warnings(self, replies: Sequence[ChatReply]) -> list[str]:
        """Return the warnings about complete replies. Those of a stream are not complete when its headers are sent."""
        return form_warnings(self.requests[0].params.structure, (reply.content for reply in replies))


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
    """Convert a task to checked engine requests. Raises ApiError; runs in a worker thread."""
    service.check_num_replies(1, task.num_choices)
    demanded = task.params.structure
    prompt = encode_task(service, task)
    requests = engine_requests(
        [prompt.token_ids],
        replace(task.params, structure=prompt.structure(demanded)),
        num_choices=task.num_choices,
        priority=task.priority,
        session=task.session,
    )
    structure_param = "tools" if demanded is None else task.names.structure
    service.check(requests, param=task.names.messages, structure_param=structure_param)
    return PreparedChat(prompt, requests)


async def chat_deltas(
    generation: Generation, replies: Sequence[ChatReply]
) -> AsyncIterator[tuple[int, Delta, list[ChatEvent]]]:
    """Add the deltas of a generation to its replies. Raises ApiError as `Generation.deltas`.

    Yields:
        The index of a reply, its delta, and the events of that delta, in order of arrival.
    """
    async for index, delta in generation.deltas():
        events = replies[index].push(delta)
        if replies[index].is_complete:
            generation.abort(index)
        yield index, delta, events
