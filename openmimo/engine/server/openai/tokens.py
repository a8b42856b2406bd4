"""Tokens in OpenAI's formats: log-probabilities, the text of each token, and the token counts of a reply (usage)."""

from typing import Any

from openmimo.core.records import Delta, TokenLogprob
from openmimo.data.tokenizer import StreamDecoder, Tokenizer

_MIN_LOGPROB = -9999.0  # JSON has no minus infinity


def chat_logprobs(tokenizer: Tokenizer, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """Convert log-probabilities to the chat format. Tokens of thinking and calls are included."""
    return {"content": [_chat_entry(tokenizer, entry) for entry in logprobs], "refusal": None}


class CompletionLogprobs:
    """Converts the log-probabilities of one choice to the completion format, with each token's offset in the text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int):
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def entries(self, logprobs: tuple[TokenLogprob | int, ...]) -> dict[str, list[Any]]:
        """Convert the next tokens. A bare id, the first token of an echoed prompt, has no log-probability."""
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in logprobs:
            token_id = entry if isinstance(entry, int) else entry.token_id
            text = _text(self._tokenizer, token_id)
            scored = None if isinstance(entry, int) else entry
            columns["tokens"].append(text)
            columns["token_logprobs"].append(scored and _finite(scored.logprob))
            columns["top_logprobs"].append(scored and self._top(scored))
            columns["text_offset"].append(self._offset)
            self._offset += len(text)
        return columns

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        pairs = entry.top[: self._num_top]
        return {_text(self._tokenizer, token_id): _finite(logprob) for token_id, logprob in pairs}


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


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode([token_id], skip_special=False)


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)
