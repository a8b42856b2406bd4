"""POST /v1/responses/compact: a conversation as one item, with the user's messages and a summary by the model."""

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openmimo.core.records import SamplingParams
from openmimo.engine.server.chat.task import ChatTask, FieldNames, PreparedChat, chat_deltas, prepare_chat
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.openai.responses.answer import usage_of
from openmimo.engine.server.openai.responses.input import messages_of
from openmimo.engine.server.openai.responses.output import new_id
from openmimo.engine.server.openai.responses.schema import (
    CompactionItem,
    InputItem,
    MessageItem,
    compacted_content,
    parts_text,
)
from openmimo.engine.server.openai.responses.task import Conversation, checked_size

_REQUEST = (
    "Summarize this conversation for yourself, so that you can continue it from the summary alone. Keep the goals, the "
    "decisions with their reasons, the results of tools, exact names and numbers, and what remains to be done."
)
_MAX_TOKENS = 4096
_MAX_REPEATS = 4


@dataclass(frozen=True)
class PreparedCompaction:
    """A conversation ready for its summary.

    Attributes:
        chat: The request for the summary.
        kept: The texts of the user's messages, those of earlier compactions included.
    """

    chat: PreparedChat
    kept: list[str]


def prepare_compaction(service: Service, conversation: Conversation, instructions: str | None) -> PreparedCompaction:
    """Build the engine request for the summary of a conversation. Raises ApiError; runs in a worker thread."""
    checked_size(service, conversation)
    messages = [*messages_of(conversation.items, instructions), {"role": "user", "content": _REQUEST}]
    limit = min(service.config.max_tokens, _MAX_TOKENS)
    params = SamplingParams(max_tokens=limit, temperature=0.0, max_repeats=_MAX_REPEATS, skip_special_tokens=False)
    chat = prepare_chat(service, ChatTask(messages, params, names=FieldNames(messages="input")))
    return PreparedCompaction(chat, _user_texts(conversation.items))


class CompactionAnswer:
    """The compacted form of a conversation, whose summary `generation` writes."""

    def __init__(self, service: Service, prepared: PreparedCompaction, generation: Generation):
        self.generation = generation
        self._kept = prepared.kept
        (self._reply,) = prepared.chat.new_replies(service.backend.tokenizer)
        self._num_prompt_tokens = len(prepared.chat.prompt.token_ids)

    async def whole(self) -> dict[str, Any]:
        async for _ in chat_deltas(self.generation, [self._reply]):
            pass
        content = compacted_content(self._kept, self._reply.content.strip())
        return {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [{"id": new_id("cmp"), "type": "compaction", "encrypted_content": content}],
            "usage": usage_of(self._reply, self._num_prompt_tokens),
        }


def _user_texts(items: Iterable[InputItem]) -> list[str]:
    texts: list[str] = []
    for item in items:
        if isinstance(item, CompactionItem):
            texts += item.kept
        elif isinstance(item, MessageItem) and item.role == "user":
            texts.append(parts_text(item.content))
    return texts
