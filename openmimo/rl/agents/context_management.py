"""Context management of long agents (paper appendix C): when a conversation gets long, it goes on in a shorter one.

Past a share of the limit the whole history is archived where the tools can read it, a summary is made, and the episode
goes on in a new conversation that has the task and the summary. Tokens that a policy has seen cannot be taken out of
its sample, so each conversation is a part of its own: `respond` ends it, and `successor()` is the next. Rollouts play
the parts one after another and give all of them the reward of the last. A caller that knows nothing of parts still gets
an ordinary episode: one whose policy came to the limit of its context, and is scored as it stands.
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
        """Keeps a text under a name. Says how the policy can read it."""
        ...


@dataclass(frozen=True)
class ContextLimits:
    """max_length: of a conversation, in the unit of `measure` (characters if that is `len`). share: of it, past which
    the context is replaced (the paper goes as low as 0.3).
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
    """The default summary: the last `kept` turns of tools, each cut to `longest` characters. Asks no model."""
    results = [turn.content for turn in history if turn.role == "tool"]
    shown = [text if len(text) <= longest else text[:longest] + " ..." for text in results[-kept:]]
    return "The latest results:\n" + "\n---\n".join(shown)


class ManagedEpisode:
    """An episode whose conversation is replaced when it gets long.

    `inner` goes on through all parts. Calls may come from different threads, one at a time, but `close` at any moment.
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
        """Of the conversation so far, in the unit of the limits."""
        return sum(self._limits.measure(turn.content) for turn in self._history)

    def respond(self, text: str) -> EnvResponse:
        """See Episode. It is over too when the context is to be replaced; then there is a successor."""
        answer = self._inner.respond(text)
        self._history.append(Message("assistant", text + answer.text))
        self._history += answer.messages
        if answer.is_last or not answer.messages or self.length <= self._limits.share * self._limits.max_length:
            return answer
        self._successor = self._next_part()
        return EnvResponse()

    def successor(self) -> "ManagedEpisode | None":
        """The next part, which now owns what the episode holds; None if the episode is over."""
        self._is_handed_over = self._successor is not None
        return self._successor

    def reward(self) -> float:
        """See Episode. Of the episode as it stands."""
        return self._inner.reward()

    def close(self) -> None:
        """See Episode. Does nothing once a successor has been given out: that one is to be closed."""
        if not self._is_handed_over:
            self._inner.close()

    def _next_part(self) -> "ManagedEpisode":
        record = "\n\n".join(f"[{turn.role}]\n{turn.content}" for turn in self._history)
        where = self._inner.archive(f"history-{self.part}", record)
        note = f"This goes on from an earlier conversation. {where}\n{self._summarize(self._history)}"
        *before, task = self._inner.messages
        messages = (*before, Message(task.role, f"{task.content}\n\n{note}"))
        return ManagedEpisode(self._inner, self._limits, self._summarize, messages=messages, part=self.part + 1)
