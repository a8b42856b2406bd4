"""The steps of one sample: its tokens while it is rolled out, and the calls of its episode.

The tokens are the prompt, the turns of the policy, and what the episode inserts. No text of the policy is tokenized
again: the ids that were sampled are the ids that are trained on.

The calls (responding, scoring, closing) may raise any exception. Each function runs as one call of `EpisodeCalls`, in a
thread if the environment is slow.
"""

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.records import Completion, Message
from openmimo.core.samples import Sample
from openmimo.data.chat.template import encode_chat
from openmimo.data.tokenizer import THINK_END, THINK_START, Tokenizer
from openmimo.rl.agents.environment import EnvResponse, Episode, ReplacesContext
from openmimo.rl.agents.episode_calls import EpisodeTimeoutError
from openmimo.rl.scheduling.groups import GroupRequest

ROUNDING = 1e-6  # by which a reward may exceed its range
NOT_SAMPLED = -1  # the version of tokens that the policy did not write


def new_sample(prompt_ids: list[int], request: GroupRequest, sample_id: str) -> Sample:
    """A sample of a request that has only its prompt."""
    length = len(prompt_ids)
    return Sample(
        token_ids=np.asarray(prompt_ids, np.int32),
        loss_mask=np.zeros(length, bool),
        logprobs=np.zeros(length),
        versions=np.full(length, NOT_SAMPLED),
        domain=request.source,
        group=request.group_id,
        temperature=request.temperature,
        info={"sample_id": sample_id, "problem": request.problem.id},
    )


def with_completion(sample: Sample, completion: Completion) -> Sample:
    """The sample with the new tokens of the engine. Routes that it has already stay those of the pass that sampled."""
    assert completion.logprobs is not None, "rollouts request log-probabilities"
    routes = completion.routed_experts
    earlier_routes = sample.routes
    if routes is not None and earlier_routes is not None:
        routes = np.concatenate([earlier_routes, routes[len(earlier_routes) :]])
    longer = _with_tokens(
        sample, completion.token_ids, completion.logprobs, completion.policy_versions, is_written=True
    )
    longer.routed_experts = routes
    return longer


def with_inserted(sample: Sample, token_ids: list[int]) -> Sample:
    """The sample with tokens that the policy reads and did not write."""
    count = len(token_ids)
    if not count:
        return sample
    return _with_tokens(sample, token_ids, np.zeros(count), np.full(count, NOT_SAMPLED), is_written=False)


def _with_tokens(
    sample: Sample,
    token_ids: list[int],
    logprobs: Sequence[float] | np.ndarray,
    versions: Sequence[int] | np.ndarray,
    *,
    is_written: bool,
) -> Sample:
    return replace(
        sample,
        token_ids=np.concatenate([sample.token_ids, np.asarray(token_ids, np.int32)]),
        loss_mask=np.concatenate([sample.loss_mask, np.full(len(token_ids), is_written)]),
        logprobs=np.concatenate([sample.logprobs, np.asarray(logprobs, np.float64)]),
        versions=np.concatenate([sample.versions, np.asarray(versions, np.int32)]),
    )


def without_thoughts(text: str, *, stop: tuple[str, ...] = ()) -> str:
    """A policy turn without its thoughts; empty if they were cut off. Text that ends in a stop string is unchanged."""
    _, end, response = text.partition(THINK_END)
    if end:
        return response
    has_stopped = any(text.endswith(ending) for ending in stop)
    return "" if text.startswith(THINK_START) and not has_stopped else text


def turn_ids(tokenizer: Tokenizer, messages: tuple[Message, ...], *, enable_thinking: bool = False) -> list[int]:
    """The ids of messages that follow a policy turn, up to the next one, without the end of the turn before them.

    Raises:
        ConfigError: The chat template changes earlier turns when later ones follow.
    """
    before = [Message("system"), Message("user", "x"), Message("assistant", "y")]
    prefix = encode_chat(tokenizer, before, add_generation_prompt=False, enable_thinking=enable_thinking)
    whole = encode_chat(tokenizer, [*before, *messages], enable_thinking=enable_thinking)
    if whole[: len(prefix)] != prefix:
        raise ConfigError(
            "the chat template changes earlier turns when later ones follow; it cannot be used for rollouts."
        )
    return whole[len(prefix) :]


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


class RewardError(UserError):
    """The reward of an environment is no number from 0 to 1."""


def checked_reward(value: Any, request: GroupRequest) -> float:
    """The reward as a float from 0 to 1. Values that are outside by up to ROUNDING are clamped.

    Args:
        value: A bool, an int, a float, or a scalar of NumPy or torch.
        request: The request of the sample, for the message.

    Raises:
        RewardError: The value is no number, not finite, or outside 0 to 1.
    """
    if isinstance(value, np.bool_) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    is_number = isinstance(value, numbers.Real)
    if is_number and math.isfinite(value) and -ROUNDING <= value <= 1 + ROUNDING:
        return min(1.0, max(0.0, float(value)))
    raise RewardError(
        f"environment {request.environment!r} (source {request.source!r}) gave problem {request.problem.id!r} the "
        f"reward {value!r}{'' if is_number else f', a {type(value).__name__}'}; a reward is a number from 0 to 1. "
        "Correct the environment's reward(), or the function of --reward."
    )


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
