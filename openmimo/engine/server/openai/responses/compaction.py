"""POST /v1/responses/compact: a conversation as one item, with the user's messages and a summary by the model."""

import secrets
import time
from collections.abc import Iterable
from typing import Any

from openmimo.core.records import SamplingParams
from openmimo.engine.server.chat.task import ChatTask, FieldNames, PreparedChat, chat_events, prepare_chat
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

_REQUEST = (
    "Summarize this conversation for yourself, so that you can continue it from the summary alone. Keep the goals, the "
    "decisions with their reasons, the results of tools, exact names and numbers, and what remains to be done."
)
_MAX_TOKENS = 4096
_MAX_REPEATS = 4


def prepare_compaction(service: Service, items: Iterable[InputItem], instructions: str | None) -> PreparedChat:
    """Build the engine request for the summary of a conversation. Raises ApiError; runs in a worker thread."""
    messages = [*messages_of(items, instructions), {"role": "user", "content": _REQUEST}]
    limit = min(service.config.max_tokens, _MAX_TOKENS)
    params = SamplingParams(max_tokens=limit, temperature=0.0, max_repeats=_MAX_REPEATS, skip_special_tokens=False)
    return prepare_chat(service, ChatTask(messages, params, names=FieldNames(messages="input")))


class CompactionAnswer:
    """The compacted form of a conversation, `items`, whose summary `generation` writes."""

    def __init__(self, service: Service, items: Iterable[InputItem], prepared: PreparedChat, generation: Generation):
        self.generation = generation
        self._kept = user_texts(items)
        self._reply = prepared.new_reply(service.backend.tokenizer)
        self._num_prompt_tokens = len(prepared.prompt.token_ids)

    async def whole(self) -> dict[str, Any]:
        async for _ in chat_events(self.generation, self._reply):
            pass
        content = compacted_content(self._kept, self._reply.content.strip())
        return {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [{"id": new_id("cmp"), "type": "compaction", "encrypted_content": content}],
            "usage": usage_of(self._reply, self._num_prompt_tokens),
        }


def user_texts(items: Iterable[InputItem]) -> list[str]:
    """Return the texts of the user's messages, those of earlier compactions included."""
    texts: list[str] = []
    for item in items:
        if isinstance(item, CompactionItem):
            texts += item.kept
        elif isinstance(item, MessageItem) and item.role == "user":
            texts.append(parts_text(item.content))
    return texts
