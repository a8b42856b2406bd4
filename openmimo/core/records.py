"""The plain records that cross every border: between the command line, the engine and, later, servers and trainers."""

from dataclasses import dataclass, field
from typing import Any

from openmimo.core.errors import ConfigError


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, in OpenAI's words. `tool_calls` are dicts with `name` and `arguments` (a dict)."""

    role: str
    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded.

    Attributes:
        max_tokens: New tokens, at most.
        temperature: Flattens or sharpens the distribution; 0 is greedy.
        top_p: Keep the smallest set of tokens with this much probability.
        top_k: Keep at most so many tokens (0: no limit).
        seed: Same seed, same text, whatever else runs in the batch; None draws one.
        stop: End before one of these strings.
        stop_token_ids: End after one of these ids, beside the checkpoint's own.
        ignore_eos: Go on after the checkpoint's end-of-text ids.
        logprobs: Return the log-probability of each new token under the raw distribution at the sampling temperature
            (before top-p and top-k; at temperature 0, that of temperature 1).
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        rules = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0.0, "0 (greedy) or more"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (no limit) or more"),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise ConfigError(f"SamplingParams.{name} is {getattr(self, name)!r}; it must be {expected}.")


@dataclass
class Completion:
    """What came of one request. `finish_reason` is "stop" (a stop string or id) or "length"."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] | None = None
    finish_reason: str = ""
