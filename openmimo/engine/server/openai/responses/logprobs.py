"""The log-probabilities of the tokens of a response's messages."""

from collections.abc import Sequence
from typing import Any

from openmimo.core.records import TokenLogprob
from openmimo.data.chat.parser import ChatEvent, ContentText, ReasoningText, ToolCallEnd
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.server.openai.tokens import chat_logprobs

_CALL_END = b"</tool_call>"
_MARK = b"\xff"  # stands for a special token; no text contains it


class MessageLogprobs:
    """Finds the tokens of each piece of a message among all tokens of the reply.

    The parser holds text back and leaves out markup, so tokens and pieces of text do not arrive together. The tokens
    wait here until a piece contains their bytes. Those of thinking and calls are dropped.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._waiting: list[tuple[TokenLogprob, int]] = []  # each with the position of its first byte in `_bytes`
        self._bytes = bytearray()

    def add(self, logprobs: Sequence[TokenLogprob]) -> None:
        """Add the tokens of a delta."""
        for entry in logprobs:
            self._waiting.append((entry, len(self._bytes)))
            self._bytes += self._bytes_of(entry.token_id)

    def of(self, part: ChatEvent) -> list[dict[str, Any]]:
        """Return the entries of the tokens of a piece of text; empty for other events. Each token is returned once."""
        match part:
            case ContentText():
                return chat_logprobs(self._tokenizer, tuple(self._tokens_of(part.text)))["content"]
            case ReasoningText():
                self._tokens_of(part.text)
            case ToolCallEnd():
                position = self._bytes.find(_CALL_END)
                self._drop(len(self._bytes) if position < 0 else position + len(_CALL_END))
        return []

    def _tokens_of(self, text: str) -> list[TokenLogprob]:
        """Remove the tokens of a piece of text, which are returned, and those before it."""
        content = text.encode()
        start = self._bytes.find(content)
        if start < 0:  # a broken character, which the text has as U+FFFD
            return self._drop(len(self._bytes))
        self._drop(start)
        return self._drop(len(content))

    def _drop(self, num_bytes: int) -> list[TokenLogprob]:
        """Remove bytes at the beginning, and the tokens that begin in them. Returns those tokens."""
        removed = [entry for entry, start in self._waiting if start < num_bytes]
        self._waiting = [(entry, start - num_bytes) for entry, start in self._waiting[len(removed) :]]
        del self._bytes[:num_bytes]
        return removed

    def _bytes_of(self, token_id: int) -> bytes:
        text = self._tokenizer.token_bytes(token_id)
        is_mark = token_id in self._tokenizer.special_token_ids and text != _CALL_END
        return _MARK if is_mark else text
