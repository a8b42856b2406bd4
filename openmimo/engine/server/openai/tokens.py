"""Tokens in OpenAI's formats: log-probabilities, the text of each token, and the token counts of a reply (usage)."""

from collections.abc import Sequence
from typing import Any

from openmimo.core.records import Delta, TokenLogprob
from openmimo.data.tokenizer import StreamDecoder, Tokenizer

_MIN_LOGPROB = -9999.0  # JSON has no minus infinity


def chat_logprobs(tokenizer: Tokenizer, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """Convert log-probabilities to the chat format. Tokens of thinking and calls are included."""
    return {"content": [_chat_entry(tokenizer, entry) for entry in logprobs], "refusal": None}


class CompletionLogprobs:
    """Converts the log-probabilities of one choice to the completion format, with each token's offset in the text.

    A token that is not whole UTF-8 is named by its bytes, as OpenAI did (`bytes:\\xe2\\x80`), so different tokens have
    different names. Its offset is that of the character that it is part of.

    Args:
        tokenizer: The model's tokenizer.
        num_top: Number of likeliest tokens at each position; the chosen token is always among them.
        skip_special: Whether the text of the reply leaves out control tokens. The echoed prompt contains them.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, skip_special: bool):
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._decoder = StreamDecoder(tokenizer, skip_special=skip_special)
        self._offset = 0

    def prompt_entries(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Convert the tokens of an echoed prompt. The first has no log-probability."""
        decoder = StreamDecoder(self._tokenizer, skip_special=False)
        columns = self._entries([None, *logprobs], token_ids, decoder)
        self._offset += len(decoder.flush())
        return columns

    def entries(self, logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Convert the next tokens of the reply."""
        return self._entries(logprobs, [entry.token_id for entry in logprobs], self._decoder)

    def _entries(
        self, logprobs: Sequence[TokenLogprob | None], token_ids: Sequence[int], decoder: StreamDecoder
    ) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            name, new_text = _name(self._tokenizer, token_id), decoder.push([token_id])
            # The decoder emits the mark of an earlier, broken character together with the next token.
            before_token = len(new_text) - len(name) if new_text.endswith(name) else 0
            columns["tokens"].append(name)
            columns["token_logprobs"].append(entry and _finite(entry.logprob))
            columns["top_logprobs"].append(entry and self._top(entry))
            columns["text_offset"].append(self._offset + before_token)
            self._offset += len(new_text)
        return columns

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        named: dict[str, float] = {}
        for token_id, logprob in (*entry.top[: self._num_top], (entry.token_id, entry.logprob)):
            named.setdefault(_name(self._tokenizer, token_id), _finite(logprob))  # the likeliest come first
        return named


def prompt_entries(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """Convert the log-probabilities of a prompt to vLLM's format: an object by token id for each token but the first.

    The rank of a token that is not among the likeliest is null.
    """
    return [None, *(_ranked(tokenizer, entry, num_top) for entry in logprobs)]


def _ranked(tokenizer: Tokenizer, entry: TokenLogprob, num_top: int) -> dict[str, dict[str, Any]]:
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, 1)}
    pairs = [(entry.token_id, entry.logprob), *entry.top[:num_top]]
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": ranks.get(token_id),
            "decoded_token": tokenizer.decode([token_id], skip_special=False),
        }
        for token_id, logprob in pairs
    }


def usage(
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    num_cached_tokens: int,
    num_reasoning_tokens: int,
    num_drafted_tokens: int,
) -> dict[str, Any]:
    """Build the usage object of completions and chats. accepted_prediction_tokens counts accepted MTP drafts."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": num_reasoning_tokens,
            "accepted_prediction_tokens": num_drafted_tokens,
        },
    }


class TokenDetails:
    """The text of each token of a reply, and whether an MTP layer drafted it."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer, skip_special=False)

    def entries(self, delta: Delta) -> list[dict[str, Any]]:
        """Return the entries of new tokens. If a character spans several tokens, the last one has its text."""
        flags = delta.drafted or (False,) * len(delta.token_ids)
        return [
            {"text": self._decoder.push([token_id]), "drafted": drafted}
            for token_id, drafted in zip(delta.token_ids, flags, strict=True)
        ]


def _chat_entry(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    pairs = [_token_entry(tokenizer, token_id, logprob) for token_id, logprob in entry.top]
    return {**_token_entry(tokenizer, entry.token_id, entry.logprob), "top_logprobs": pairs}


def _token_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    token_bytes = tokenizer.token_bytes(token_id)
    text = token_bytes.decode("utf-8", errors="replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(token_bytes)}


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    token_bytes = tokenizer.token_bytes(token_id)
    try:
        return token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)
