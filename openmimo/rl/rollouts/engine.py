"""Rollouts: problems in, samples out, through an engine. Tokens in, tokens out: no text is ever tokenized again.

The engine samples; an episode answers each time the policy stops; what comes of it is one sample with a
log-probability, a policy version and, for a model with experts, the routes of every token. Turns of one sample share an
engine session, so that keys, values and routes of earlier turns stay those of the pass that sampled them (paper section
4.6.1).
"""

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from openmimo.core.errors import ConfigError
from openmimo.core.records import Completion, Message, Request, SamplingParams
from openmimo.core.samples import Sample
from openmimo.data.chat.conversation import encode_prompt
from openmimo.data.chat.template import encode_chat
from openmimo.data.tokenizer import THINK_END, THINK_START, Tokenizer
from openmimo.engine.engine import Engine
from openmimo.engine.request_state import RequestState
from openmimo.rl.agents.environment import EnvResponse, Episode, ReplacesContext
from openmimo.rl.agents.episode_calls import EpisodeCalls, EpisodeTimeoutError
from openmimo.rl.scheduling.groups import GroupRequest, LateReward
from openmimo.rl.scheduling.rewards import RewardError, checked_reward

NOT_SAMPLED = -1
POLL_SECONDS = 0.01
WHOLE = ("stop", "length", "repetition")  # reasons with which the policy itself ends a sample
_UNSCORED = object()

EpisodeOpener = Callable[[GroupRequest], Episode]


class Rollouts(Protocol):
    """Whatever rolls samples out: the engine of this process, another process, or workers elsewhere."""

    @property
    def num_running(self) -> int:
        """Samples that were submitted and have not come back."""
        ...

    def submit(self, request: GroupRequest) -> None:
        """Begins the request's samples."""
        ...

    @property
    def num_unscored(self) -> int:
        """Samples that came back without their reward."""
        ...

    def poll(self) -> list[Sample | LateReward]:
        """Runs for a moment, or waits for one. The samples that ended, and rewards of samples that ended before.

        A sample whose reward is NaN has no error: its reward follows.
        """
        ...

    def interrupt(self) -> list[Sample]:
        """Stops running samples that a later request can continue, and returns what they have written.

        Samples that no request can continue keep running, as all samples of workers do.
        """
        ...

    def cancel(self, sample_ids: list[str]) -> None:
        """Stops samples whose group has ended; they do not come back."""
        ...

    def update_weights(self, version: int) -> None:
        """The policy has new weights from now on; what is running goes on with them, and keeps what it has read."""
        ...

    def close(self) -> None:
        """Ends everything."""
        ...


@dataclass
class _Run:
    """One sample on its way. episode: None if it could not be opened."""

    id: str
    request: GroupRequest
    episode: Episode | None
    sample: Sample
    earlier: list[Sample] = field(default_factory=list)
    num_turns: int = 0
    pending: "Future[Any] | None" = None
    finish_reason: str = ""

    @property
    def context_id(self) -> str:
        return f"{self.id}/{len(self.earlier)}" if self.earlier else self.id

    @property
    def num_written(self) -> int:
        return sum(context.num_answer_tokens for context in (*self.earlier, self.sample))


class EngineRollouts:
    """Rollouts by an engine in this process, which may run the very model that is trained.

    A sample whose episode fails comes back with finish_reason "error"; its info has `error`, and `error_kind`, which is
    the same for failures of one kind. One whose prompt is too long comes back as "too_long", with `prompt_tokens` and
    the `limit` in its info.

    Args:
        engine: Samples; must have a tokenizer.
        open_episode: From a request (its problem and source) to an episode.
        calls: Runs the episodes (None: in turn, with the usual deadline).
        timeout_reward: Of a sample whose episode takes too long (None: it failed).
        seed: With a sample's id and its turn, decides its tokens.
        record_routing: Keep the routes (R3).
        thinking: Ask for answers with thoughts before them. Episodes do not see the thoughts.
        weights: New weights for `update_weights`; None if the engine's model has them already.
        late_rewards: Return each sample when the policy has ended it. Its reward is computed while others run, and
            follows as a LateReward.
    """

    def __init__(
        self,
        engine: Engine,
        open_episode: EpisodeOpener,
        *,
        calls: EpisodeCalls | None = None,
        timeout_reward: float | None = None,
        seed: int = 0,
        record_routing: bool = True,
        thinking: bool = False,
        weights: Callable[[], Mapping[str, Any] | None] = lambda: None,
        late_rewards: bool = False,
    ):
        if engine.tokenizer is None:
            raise ConfigError("rollouts need an engine with a tokenizer: environments speak text.")
        self._engine, self._tokenizer = engine, engine.tokenizer
        self._open_episode, self._timeout_reward = open_episode, timeout_reward
        self._calls, self._owns_calls = calls or EpisodeCalls(), calls is None
        self._seed, self._weights, self._thinking = seed, weights, thinking
        self._record_routing = record_routing and engine.model.config.moe is not None
        self._late_rewards = late_rewards
        self._runs: dict[str, _Run] = {}
        self._scoring: dict[str, _Run] = {}
        self._followers: list[tuple[RequestState, _Run]] = []  # and whom they wait for

    @property
    def num_running(self) -> int:
        """See Rollouts."""
        return len(self._runs)

    @property
    def num_unscored(self) -> int:
        """See Rollouts."""
        return len(self._scoring)

    @property
    def is_instant(self) -> bool:
        """Whether each call of an episode is waited for, so that the same requests give the same samples in order."""
        return self._calls.is_instant

    def submit(self, request: GroupRequest) -> None:
        """See Rollouts. A partial is read again and continues where it stopped; one of several turns begins again.

        Samples of one prompt begin once the first of them has read it, so that the others find it in the cache.
        """
        prompts: dict[tuple[Message, ...], list[int]] = {}
        leaders: dict[tuple[int, ...], RequestState] = {}
        for sample_id in request.sample_ids:
            run = self._open(request, sample_id, prompts)
            self._runs[sample_id] = run
            if run.pending is not None:
                continue
            prompt = tuple(run.sample.token_ids.tolist())
            if prompt in leaders:
                self._followers.append((leaders[prompt], run))
                continue
            sequence = self._next_turn(run)
            if sequence is not None and sequence.request.session is None and self._engine.config.prefix_cache:
                leaders[prompt] = sequence

    def _open(self, request: GroupRequest, sample_id: str, prompts: dict[tuple[Message, ...], list[int]]) -> _Run:
        """The run of a sample, with its episode opened. It has ended already if that failed, or its prompt is too long.

        prompts: the ids of those that were encoded already.
        """
        run = _Run(sample_id, request, None, _new_sample([], request, sample_id))
        opening = functools.partial(_at, "open", functools.partial(self._open_episode, request))
        opened = self._calls.wait_for(opening, discard=_close_late)
        if opened.exception() is not None:
            run.pending = opened
            return run
        run.episode = episode = opened.result()
        partial = request.partials.get(sample_id)
        if partial is not None and self._goes_on(partial, episode):
            run.sample = replace(partial, finish_reason="")
            if partial.finish_reason in WHOLE:
                run.finish_reason, run.num_turns = partial.finish_reason, 1
                self._hand_over(run, start=partial.prompt_length)
            return run
        if episode.messages not in prompts:
            encoded = self._encoded(episode)
            if encoded.exception() is not None:
                run.pending = encoded
                return run
            prompts[episode.messages] = encoded.result()
        run.sample = _new_sample(prompts[episode.messages], request, sample_id)
        limit = min(request.max_prompt_tokens or math.inf, self._engine.model.config.max_positions - 1)
        if len(run.sample) > limit:
            run.finish_reason = "too_long"
            run.sample.info |= {"prompt_tokens": len(run.sample), "limit": limit}
            run.pending = _done(None)
        return run

    def _encoded(self, episode: Episode) -> "Future[list[int]]":
        """The ids of an episode's prompt. One that fits no template ends its sample, not the run."""
        encode = functools.partial(
            encode_prompt, self._tokenizer, episode.messages, tools=episode.tools, enable_thinking=self._thinking
        )
        future: Future[list[int]] = Future()
        try:
            future.set_result(_at("the prompt", encode))
        except EpisodeError as error:
            future.set_exception(error)
        return future

    def poll(self) -> list[Sample | LateReward]:
        """See Rollouts. Waits at most a hundredth of a second, if there is nothing to do but to wait for episodes."""
        for sequence in self._engine.step():
            if sequence.finish_reason:
                self._take_turn(self._runs[sequence.request.id], sequence.completion())
        self._begin_followers()
        self._calls.give_up_overdue()
        if not self._engine.has_work:
            pending = [run.pending for run in (*self._runs.values(), *self._scoring.values()) if run.pending]
            wait(pending, POLL_SECONDS, FIRST_COMPLETED)
        ended = [run for run in self._runs.values() if run.pending is not None and run.pending.done()]
        finished: list[Sample | LateReward] = [
            self._scored(run) for run in list(self._scoring.values()) if run.pending.done()
        ]
        for run in ended:
            sample = self._answered(run)
            if sample is not None:
                del self._runs[run.id]
                finished.append(sample)
        return finished

    def cancel(self, sample_ids: list[str]) -> None:
        """See Rollouts."""
        for sample_id in sample_ids:
            run = self._runs.pop(sample_id, None) or self._scoring.pop(sample_id, None)
            if run is not None:
                self._engine.abort(sample_id)
                if run.pending is not None:
                    run.pending.cancel()
                    run.pending.add_done_callback(_close_unplayed)
                self._close(run)

    def interrupt(self) -> list[Sample]:
        """See Rollouts. Samples in their first turn, of episodes without tools or stop strings."""
        interrupted = []
        for run in list(self._runs.values()):
            if run.pending is not None or run.num_turns > 1 or run.earlier or run.episode.stop or run.episode.tools:
                continue
            state = self._engine.abort(run.id)
            if state is not None and len(state.tokens) > state.prompt_length:
                run.sample = _extended(run.sample, state.completion())
            del self._runs[run.id]
            self._close(run)
            interrupted.append(run.sample)
        return interrupted

    def update_weights(self, version: int) -> None:
        """See Rollouts."""
        self._engine.update_weights(self._weights(), version=version, recompute=False)

    def close(self) -> None:
        """See Rollouts."""
        self.cancel([*self._runs, *self._scoring])
        self._engine.forget_cached()
        if self._owns_calls:
            self._calls.close()

    def _goes_on(self, partial: Sample, episode: Episode) -> bool:
        """Whether a new episode can continue it: the policy has had one turn, and no response to it."""
        written = partial.loss_mask[partial.prompt_length :]
        is_one_turn = len(written) > 0 and written.all() and not episode.stop and not episode.tools
        has_ended = partial.finish_reason in WHOLE
        ends_turn = int(partial.token_ids[-1]) in self._engine.eos_ids if len(partial) else False
        return is_one_turn and not partial.earlier and (has_ended or not ends_turn)

    def _begin_followers(self) -> None:
        waiting, self._followers = self._followers, []
        for leader, run in waiting:
            if leader.num_uncomputed_tokens > 1 and not leader.finish_reason:
                self._followers.append((leader, run))
            elif self._runs.get(run.id) is run:
                self._next_turn(run)

    def _next_turn(self, run: _Run, inserted: Iterable[int] = ()) -> RequestState | None:
        """Asks the engine for the policy's next turn, after what was inserted; ends the sample if no token is left."""
        inserted = list(inserted)
        room = min(
            run.request.max_answer_tokens - run.num_written,
            self._engine.model.config.max_positions - len(run.sample) - len(inserted),
        )
        if room <= 0:
            run.finish_reason = "length"
            scoring = functools.partial(_reward, run.episode, run.request)
            run.pending = _done(_UNSCORED) if self._late_rewards else self._call(scoring)
            return None
        run.sample = _with_inserted(run.sample, inserted)
        params = SamplingParams(
            max_tokens=room,
            temperature=run.request.temperature,
            seed=_seed_of(self._seed, run.context_id, len(run.sample), self._engine.policy_version),
            stop=run.episode.stop,
            logprobs=True,
            routed_experts=self._record_routing,
            skip_special_tokens=False,
        )
        session = run.id if run.num_turns or run.episode.stop or run.episode.tools else None
        run.num_turns += 1
        prompt = tuple(run.sample.token_ids.tolist())
        request = Request(run.id, prompt, params, run.request.priority, session=session)
        return self._engine.submit(request)

    def _take_turn(self, run: _Run, completion: Completion) -> None:
        """Adds the policy's turn to the sample, and hands it to the episode."""
        start = len(run.sample) if run.num_turns > 1 else run.sample.prompt_length
        run.sample = _extended(run.sample, completion)
        run.finish_reason = completion.finish_reason
        if completion.finish_reason == "error":
            run.pending = _failed("the engine could not go on with it")
            return
        self._hand_over(run, start=start)

    def _hand_over(self, run: _Run, *, start: int) -> None:
        """Gives the episode the policy's turn, which begins at token `start`."""
        written = run.sample.token_ids[start:].tolist()
        if written[-1] in self._engine.eos_ids:
            written = written[:-1]
        text = self._tokenizer.decode(written, skip_special=False)
        if self._thinking:
            text = without_thoughts(text, stop=run.episode.stop)
        score = not self._late_rewards
        run.pending = self._call(
            functools.partial(_respond, run.episode, run.request, text, run.finish_reason, score=score)
        )

    def _answered(self, run: _Run) -> Sample | None:
        """What the episode said: another turn or context (None), or the finished sample."""
        error = run.pending.exception()
        if isinstance(error, RewardError):
            raise error
        answer = None if error else run.pending.result()
        if isinstance(answer, EnvResponse):
            return self._go_on(run, answer)
        if isinstance(answer, _Successor):
            self._replace_context(run, answer.episode)
            return None
        if answer is _UNSCORED:
            self._engine.end_session(run.id)
            run.pending = self._call(functools.partial(_reward, run.episode, run.request))
            self._scoring[run.id] = run
            return self._ended(run, math.nan, run.sample.info | {"turns": run.num_turns})
        self._close(run)
        if run.finish_reason == "too_long":
            return replace(run.sample, finish_reason="too_long")
        reward, verdict = self._verdict(run, error, answer)
        info = run.sample.info | {"turns": run.num_turns} | verdict
        if math.isnan(reward):
            return replace(run.sample, finish_reason="error", reward=reward, info=info)
        return self._ended(run, reward, info)

    def _scored(self, run: _Run) -> LateReward:
        """The reward of a sample that came back before it."""
        del self._scoring[run.id]
        self._close(run)
        error = run.pending.exception()
        if isinstance(error, RewardError):
            raise error
        reward, info = self._verdict(run, error, None if error else run.pending.result())
        finish_reason = "error" if math.isnan(reward) else run.finish_reason
        info |= {"problem": run.request.problem.id}
        return LateReward(run.id, run.request.source, run.request.group_id, reward, finish_reason, info)

    def _verdict(self, run: _Run, error: BaseException | None, reward: Any) -> tuple[float, dict[str, Any]]:
        """The reward, NaN after a failure, and what the sample's info says of it."""
        info: dict[str, Any] = {}
        if isinstance(error, EpisodeTimeoutError):
            info["timeout"] = True
            if self._timeout_reward is not None and run.num_written:
                return self._timeout_reward, info
        return (reward, info) if error is None else (math.nan, info | _described(error))

    def _ended(self, run: _Run, reward: float, info: dict[str, Any]) -> Sample:
        sample = replace(run.sample, finish_reason=run.finish_reason, reward=reward, info=info)
        if run.earlier:
            sample.episode = run.id
            sample.earlier = [replace(context, reward=reward, episode=run.id) for context in run.earlier]
        return sample

    def _go_on(self, run: _Run, answer: EnvResponse) -> None:
        """The policy's next turn, after what the episode answered."""
        run.pending = None
        try:
            inserted = _at("respond", functools.partial(self._inserted_ids, answer))
        except EpisodeError as error:
            run.pending = Future()
            run.pending.set_exception(error)
            return
        self._next_turn(run, inserted)

    def _replace_context(self, run: _Run, successor: Episode) -> None:
        """The sample so far becomes an earlier one, and the policy reads a new prompt."""
        self._engine.end_session(run.id)
        run.earlier.append(replace(run.sample, finish_reason="context"))
        run.episode, run.pending = successor, None
        encoded = self._encoded(successor)
        if encoded.exception() is not None:
            run.pending = encoded
            return
        run.sample = _new_sample(encoded.result(), run.request, run.id)
        self._next_turn(run)

    def _inserted_ids(self, answer: EnvResponse) -> list[int]:
        if answer.messages:
            return turn_ids(self._tokenizer, answer.messages, enable_thinking=self._thinking)
        return self._tokenizer.encode(answer.text)

    def _call(self, function: Callable[[], Any]) -> "Future[Any]":
        return self._calls.submit(function, discard=_close_late)

    def _close(self, run: _Run) -> None:
        self._engine.end_session(run.id)
        if run.episode is not None:
            self._calls.submit(functools.partial(_close_episode, run.episode, run.request))


def without_thoughts(text: str, *, stop: tuple[str, ...] = ()) -> str:
    """What comes after the thoughts; nothing if they are cut off. A piece that ends in a stop string stays as it is."""
    _, end, answer = text.partition(THINK_END)
    if end:
        return answer
    has_stopped = any(text.endswith(ending) for ending in stop)
    return "" if text.startswith(THINK_START) and not has_stopped else text


def turn_ids(tokenizer: Tokenizer, messages: tuple[Message, ...], *, enable_thinking: bool = False) -> list[int]:
    """The ids of turns that follow an answer of the policy, up to its next turn; its own end of turn is not in them."""
    before = [Message("system"), Message("user", "x"), Message("assistant", "y")]
    known = encode_chat(tokenizer, before, add_generation_prompt=False, enable_thinking=enable_thinking)
    asked = encode_chat(tokenizer, [*before, *messages], enable_thinking=enable_thinking)
    if asked[: len(known)] != known:
        raise ConfigError(
            "the chat template changes earlier turns when later ones come; it cannot be used for rollouts."
        )
    return asked[len(known) :]


@dataclass(frozen=True)
class _Successor:
    """The episode that goes on in another context."""

    episode: Episode


class EpisodeError(Exception):
    """An episode raised an exception. kind: the same for those of one type from one method."""

    def __init__(self, method: str, error: BaseException):
        super().__init__(f"{method} raised {type(error).__name__}: {error}")
        self.kind = f"{method} raised {type(error).__name__}"


def _at(method: str, function: Callable[[], Any]) -> Any:
    """function(), with its exceptions as EpisodeErrors."""
    try:
        return function()
    except Exception as error:  # an environment may raise anything; the run counts it and shows the first
        raise EpisodeError(method, error) from error


def _described(error: BaseException) -> dict[str, str]:
    """What a failed sample's info says."""
    if isinstance(error, EpisodeError):
        return {"error": str(error), "error_kind": error.kind}
    kind = "timeout" if isinstance(error, EpisodeTimeoutError) else type(error).__name__
    return {"error": f"{kind}: {error}", "error_kind": kind}


def _failed(why: str) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_exception(RuntimeError(why))
    return future


def _close_unplayed(pending: "Future[Any]") -> None:
    """Closes the episode that was to go on in another context, once it is there."""
    if not pending.cancelled() and not pending.exception():
        _close_late(pending.result())


def _close_late(result: Any) -> None:
    """Closes an episode that came after its deadline."""
    if isinstance(result, _Successor):
        result.episode.close()
    elif isinstance(result, Episode):
        result.close()


def _close_episode(episode: Episode, request: GroupRequest) -> None:
    try:
        episode.close()
    except Exception as error:  # the sample is scored already
        kind = f"closing an episode of environment {request.environment!r} raised {type(error).__name__}"
        warnings.warn(f"{kind}: {error}", stacklevel=1)


def _reward(episode: Episode, request: GroupRequest) -> float:
    return checked_reward(_at("reward", episode.reward), request)


def _respond(
    episode: Episode, request: GroupRequest, text: str, finish_reason: str, *, score: bool
) -> EnvResponse | _Successor | float | object:
    """The episode's next response; the episode that continues in another context; or the reward after the last one.

    The response is also the last if the policy may write no more. Without `score`, _UNSCORED stands for the reward.
    """
    answer = _at("respond", functools.partial(episode.respond, text))
    if not isinstance(answer, EnvResponse):
        raise EpisodeError("respond", TypeError(f"it must return an EnvResponse, not a {type(answer).__name__}"))
    if not answer.is_last and finish_reason == "stop":
        return answer
    if finish_reason == "stop" and isinstance(episode, ReplacesContext):
        successor = _at("successor", episode.successor)
        if successor is not None:
            return _Successor(successor)
    return _reward(episode, request) if score else _UNSCORED


def _new_sample(token_ids: list[int], request: GroupRequest, sample_id: str) -> Sample:
    return Sample(
        token_ids=token_ids,
        loss_mask=np.zeros(len(token_ids), bool),
        logprobs=np.zeros(len(token_ids)),
        versions=np.full(len(token_ids), NOT_SAMPLED),
        domain=request.source,
        group=request.group_id,
        temperature=request.temperature,
        info={"sample_id": sample_id, "problem": request.problem.id},
    )


def _extended(sample: Sample, completion: Completion) -> Sample:
    """The sample with what the engine wrote. Routes that were recorded before stay those of the pass that sampled."""
    routes = completion.routed_experts
    if routes is not None and sample.routed_experts is not None:
        routes = np.concatenate([sample.routes, routes[len(sample.routed_experts) :]])
    longer = _longer(sample, completion.token_ids, completion.logprobs, completion.policy_versions, is_written=True)
    longer.routed_experts = routes
    return longer


def _with_inserted(sample: Sample, token_ids: list[int]) -> Sample:
    count = len(token_ids)
    if not count:
        return sample
    return _longer(sample, token_ids, np.zeros(count), np.full(count, NOT_SAMPLED), is_written=False)


def _longer(
    sample: Sample, token_ids: list[int], logprobs: Sequence[float], versions: Sequence[int], *, is_written: bool
) -> Sample:
    """The sample with these tokens after its own."""
    return replace(
        sample,
        token_ids=np.concatenate([sample.token_ids, np.asarray(token_ids, np.int32)]),
        loss_mask=np.concatenate([sample.loss_mask, np.full(len(token_ids), is_written)]),
        logprobs=np.concatenate([sample.logprobs, np.asarray(logprobs, np.float64)]),
        versions=np.concatenate([sample.versions, np.asarray(versions, np.int32)]),
    )


def _seed_of(*parts: int | str) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _done(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(value)
    return future
