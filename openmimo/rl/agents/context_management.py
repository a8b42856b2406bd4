"""Context management of long agent episodes (paper appendix C): a long conversation is replaced by a shorter one.

When a conversation exceeds a share of the limit, its history is archived where the tools can read it, a summary is
made, and the episode continues in a new conversation with the task and the summary. A sample must contain every token
that the policy has seen, so each conversation is a separate part: `respond` ends it, and `successor()` is the next.
Rollouts play the parts in order and give all of them the reward of the last one. For a caller that ignores parts, the
episode simply ends at the context limit and is scored in its current state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from openmimo.core.errors import ConfigError
from openmimo.core.records import Message
from openmimo.rl.agents.environment import EnvResponse, Episode

Summarize = Callable[[Sequence[Message]], str]


class ArchivingEpisode(Episode, Protocol):
    """An episode whose tools can read what it archives."""

    def archive(self, name: str, text: str) -> str:
        """Stores a text under a name. Returns a sentence that says how the policy can read it."""
        ...


@dataclass(frozen=True)
class ContextLimits:
    """When a conversation is replaced.

    Attributes:
        max_length: Maximum length of a conversation in the unit of `measure`.
        share: The conversation is replaced beyond this share of it (the paper goes down to 0.3).
        measure: The length of a text (characters by default).
    """

    max_length: int
    share: float = 0.3
    measure: Callable[[str], int] = len

    def __post_init__(self) -> None:
        if self.max_length < 1 or not 0.0 < self.share <= 1.0:
            raise ConfigError(
                f"ContextLimits are max_length {self.max_length} and share {self.share}; they must be at least 1, and "
                "above 0 and at most 1."
            )


def latest_results(history: Sequence[Message], *, kept: int = 2, longest: int = 500) -> str:
    """The default summary: the last `kept` tool turns, each truncated to `longest` characters. Uses no model."""
    results = [turn.content for turn in history if turn.role == "tool"]
    shown = [text if len(text) <= longest else text[:longest] + " ..." for text in results[-kept:]]
    return "The latest results:\n" + "\n---\n".join(shown)


class ManagedEpisode:
    """An episode whose conversation is replaced when it becomes long. `inner` spans all parts.

    Calls may come from different threads, but one at a time. `close` may be called at any time.
    """

    def __init__(
        self,
        inner: ArchivingEpisode,
        limits: ContextLimits,
        summarize: Summarize = latest_results,
        *,
        messages: tuple[Message, ...] | None = None,
        part: int = 1,
    ):
        self.messages = inner.messages if messages is None else messages
        self.tools, self.stop = inner.tools, inner.stop
        self.part = part
        self._inner, self._limits, self._summarize = inner, limits, summarize
        self._history = list(self.messages)
        self._successor: ManagedEpisode | None = None
        self._is_handed_over = False

    @property
    def length(self) -> int:
        """Length of the conversation in the unit of the limits."""
        return sum(self._limits.measure(turn.content) for turn in self._history)

    def respond(self, text: str) -> EnvResponse:
        """Forwards a turn to `inner`. The part also ends when the context is replaced; then there is a successor."""
        answer = self._inner.respond(text)
        self._history.append(Message("assistant", text + answer.text))
        self._history += answer.messages
        if answer.is_last or not answer.messages or self.length <= self._limits.share * self._limits.max_length:
            return answer
        self._successor = self._next_part()
        return EnvResponse()

    def successor(self) -> "ManagedEpisode | None":
        """The next part, which takes over the resources of the episode; None if the episode is over."""
        self._is_handed_over = self._successor is not None
        return self._successor

    def reward(self) -> float:
        """The reward of `inner` in its current state."""
        return self._inner.reward()

    def close(self) -> None:
        """Closes `inner`, unless a successor has taken it over."""
        if not self._is_handed_over:
            self._inner.close()

    def _next_part(self) -> "ManagedEpisode":
        record = "\n\n".join(f"[{turn.role}]\n{turn.content}" for turn in self._history)
        where = self._inner.archive(f"history-{self.part}", record)
        note = f"This goes on from an earlier conversation. {where}\n{self._summarize(self._history)}"
        *before, task = self._inner.messages
        messages = (*before, Message(task.role, f"{task.content}\n\n{note}"))
        return ManagedEpisode(self._inner, self._limits, self._summarize, messages=messages, part=self.part + 1)
