"""Calls of an episode, which may raise any exception: responding, scoring and closing.

Each function runs as one call of `EpisodeCalls`, in a thread if the environment is slow.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from openmimo.rl.agents.environment import EnvResponse, Episode, ReplacesContext
from openmimo.rl.agents.episode_calls import EpisodeTimeoutError
from openmimo.rl.scheduling.groups import GroupRequest
from openmimo.rl.scheduling.rewards import checked_reward

UNSCORED = object()  # the result of a last response whose reward is a call of its own


@dataclass(frozen=True)
class Successor:
    """The episode that continues in another context."""

    episode: Episode


class EpisodeError(Exception):
    """An episode raised an exception.

    Attributes:
        kind: Equal for exceptions of one type from one method.
    """

    def __init__(self, method: str, error: BaseException):
        super().__init__(f"{method} raised {type(error).__name__}: {error}")
        self.kind = f"{method} raised {type(error).__name__}"


def guarded(method: str, function: Callable[[], Any]) -> Any:
    """The result of `function`. Its exceptions become EpisodeErrors that name the method."""
    try:
        return function()
    except Exception as error:  # an environment may raise anything; the run counts it and shows the first
        raise EpisodeError(method, error) from error


def respond(
    episode: Episode, request: GroupRequest, text: str, finish_reason: str, *, score: bool
) -> EnvResponse | Successor | float | object:
    """Pass a policy turn to the episode.

    Args:
        episode: The episode.
        request: The request of the sample.
        text: The policy turn.
        finish_reason: Why the turn ended. Unless it is "stop", the policy may write no more.
        score: Compute the reward after the last response.

    Returns:
        The response; the episode that continues in another context; or, after the last response, the reward, or
        UNSCORED without `score`.

    Raises:
        EpisodeError: The episode raised an exception, or its response is no EnvResponse.
        RewardError: The reward is no number from 0 to 1.
    """
    response = guarded("respond", lambda: episode.respond(text))
    if not isinstance(response, EnvResponse):
        raise EpisodeError("respond", TypeError(f"it must return an EnvResponse, not a {type(response).__name__}"))
    if not response.is_last and finish_reason == "stop":
        return response
    if finish_reason == "stop" and isinstance(episode, ReplacesContext):
        successor = guarded("successor", episode.successor)
        if successor is not None:
            return Successor(successor)
    return reward_of(episode, request) if score else UNSCORED


def reward_of(episode: Episode, request: GroupRequest) -> float:
    """The checked reward. Raises EpisodeError or RewardError as `respond` does."""
    return checked_reward(guarded("reward", episode.reward), request)


def close_episode(episode: Episode, request: GroupRequest) -> None:
    """Close an episode. An exception is only a warning, as the sample has its reward already."""
    try:
        episode.close()
    except Exception as error:  # an environment may raise anything
        kind = f"closing an episode of environment {request.environment!r} raised {type(error).__name__}"
        warnings.warn(f"{kind}: {error}", stacklevel=1)


def close_late(result: Any) -> None:
    """Close an episode that a call returned after its deadline."""
    if isinstance(result, Successor):
        result.episode.close()
    elif isinstance(result, Episode):
        result.close()


def close_unused(pending: "Future[Any]") -> None:
    """Close the episode that a cancelled sample would have continued with, once its call has returned."""
    if not pending.cancelled() and not pending.exception():
        close_late(pending.result())


def failure_info(error: BaseException) -> dict[str, str]:
    """The entries `error` and `error_kind` in the info of a failed sample."""
    if isinstance(error, EpisodeError):
        return {"error": str(error), "error_kind": error.kind}
    kind = "timeout" if isinstance(error, EpisodeTimeoutError) else type(error).__name__
    return {"error": f"{kind}: {error}", "error_kind": kind}


def completed(value: Any) -> "Future[Any]":
    """A future that has a result."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def failed(error: BaseException) -> "Future[Any]":
    """A future that has an exception."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
