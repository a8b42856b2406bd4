"""Rollouts by an engine of this process: problems in, samples out.

The engine writes the policy's turns; an episode responds after each. The result is one sample with a log-probability, a
policy version and, for a model with experts, the routes of every token. All turns of a sample share an engine session,
so that keys, values and routes of earlier turns stay those of the pass that sampled them (paper section 4.6.1).

    submit -> open the episode -> [ engine: policy turn -> episode: response ] repeated -> reward -> poll

`_Run.pending` is the call of the episode that the sample waits for. While it is None, the engine writes.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

from openmimo.core.errors import ConfigError
from openmimo.core.records import Completion, Message, Request, SamplingParams
from openmimo.core.samples import Sample
from openmimo.data.chat.conversation import encode_prompt
from openmimo.engine.engine import Engine
from openmimo.engine.request_state import RequestState
from openmimo.rl.agents.environment import EnvResponse, Episode
from openmimo.rl.agents.episode_calls import EpisodeCalls, EpisodeTimeoutError
from openmimo.rl.rollouts import episode_steps
from openmimo.rl.rollouts.episode_steps import (
    UNSCORED,
    EpisodeError,
    RewardError,
    Successor,
    completed,
    failed,
    guarded,
    new_sample,
    turn_ids,
    with_completion,
    with_inserted,
    without_thoughts,
)
from openmimo.rl.scheduling.groups import GroupRequest, LateReward

POLL_SECONDS = 0.01
ENDED_BY_POLICY = ("stop", "length", "repetition")

EpisodeOpener = Callable[[GroupRequest], Episode]


@dataclass
class _Run:
    """A sample that is being rolled out or scored.

    Attributes:
        id: The id of the sample.
        request: The request that it belongs to.
        episode: None if opening it failed.
        sample: The tokens of the current context.
        earlier: Earlier contexts of the episode.
        num_turns: Policy turns, including the running one.
        pending: The call of the episode that the sample waits for; None while the engine writes.
        finish_reason: Why the last policy turn ended.
    """

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

    @property
    def has_result(self) -> bool:
        return self.pending is not None and self.pending.done()

    @property
    def can_be_interrupted(self) -> bool:
        """Whether a later request can continue the sample: in its first turn, without tools or stop strings."""
        if self.pending is not None or self.num_turns > 1 or self.earlier:
            return False
        assert self.episode is not None
        return not self.episode.stop and not self.episode.tools


class EngineRollouts:
    """Rollouts by an engine in this process, which may run the model that is trained.

    A sample whose episode fails ends with finish_reason "error"; its info has `error`, and `error_kind`, which is equal
    for failures of one kind. A sample whose prompt is too long ends as "too_long"; its info has `prompt_tokens` and
    `limit`.
    """

    runs_while_learning = False

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
        """
        Args:
            engine: Writes the policy's turns; it must have a tokenizer.
            open_episode: Opens the episode of a request's problem.
            calls: Runs the calls of episodes (None: one at a time, with the default deadline).
            timeout_reward: The reward of a sample whose episode exceeds its deadline (None: the sample failed).
            seed: Determines the tokens of a sample together with its id, its position and the policy version.
            record_routing: Record the routed experts (R3).
            thinking: Let the policy think before it responds. Episodes do not see the thoughts.
            weights: The new weights for `update_weights`; None if the engine's model has them already.
            late_rewards: Return each sample when the policy has ended it. Its reward is computed while others run, and
                is returned as a LateReward.
        """
        if engine.tokenizer is None:
            raise ConfigError("rollouts need an engine with a tokenizer, because environments read and write text.")
        self._engine, self._tokenizer = engine, engine.tokenizer
        self._open_episode, self._timeout_reward = open_episode, timeout_reward
        self._calls, self._owns_calls = calls or EpisodeCalls(), calls is None
        self._seed, self._weights, self._thinking = seed, weights, thinking
        self._record_routing = record_routing and engine.model.config.moe is not None
        self._late_rewards = late_rewards
        self._runs: dict[str, _Run] = {}
        self._scoring: dict[str, _Run] = {}  # returned without their reward
        self._followers: list[tuple[RequestState, _Run]] = []  # each with the request that reads its prompt first

    @property
    def num_running(self) -> int:
        return len(self._runs)

    @property
    def num_unscored(self) -> int:
        return len(self._scoring)

    @property
    def repeats_exactly(self) -> bool:
        """Whether calls of episodes run one at a time. Then the same requests give the same samples in order."""
        return self._calls.is_instant

    def metrics(self) -> dict[str, float]:
        """The engine of this process has no metrics of its own."""
        return {}

    def submit(self, request: GroupRequest) -> None:
        """Start the samples of a request. A partial of one turn continues; one of several turns starts again.

        Samples of one prompt start when the first of them has read it, so that the others find it in the prefix cache.
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
            state = self._next_turn(run)
            if state is not None and state.request.session is None and self._engine.config.prefix_cache:
                leaders[prompt] = state

    def _open(self, request: GroupRequest, sample_id: str, prompts: dict[tuple[Message, ...], list[int]]) -> _Run:
        """Open the episode of a sample. The result has a pending call if that failed, or the prompt is too long.

        Args:
            request: The request of the sample.
            sample_id: The sample.
            prompts: Prompts of the request that have been encoded; this method adds to them.
        """
        run = _Run(sample_id, request, None, new_sample([], request, sample_id))
        opening = functools.partial(guarded, "open", functools.partial(self._open_episode, request))
        opened = self._calls.wait_for(opening, discard=episode_steps.close_late)
        if opened.exception() is not None:
            run.pending = opened
            return run
        episode: Episode = opened.result()
        run.episode = episode
        partial = request.partials.get(sample_id)
        if partial is not None and self._can_continue(partial, episode):
            run.sample = replace(partial, finish_reason="")
            if partial.finish_reason in ENDED_BY_POLICY:
                run.finish_reason, run.num_turns = partial.finish_reason, 1
                self._pass_turn(run, start=partial.prompt_length)
            return run
        if episode.messages not in prompts:
            encoded = self._encoded(episode)
            if encoded.exception() is not None:
                run.pending = encoded
                return run
            prompts[episode.messages] = encoded.result()
        run.sample = new_sample(prompts[episode.messages], request, sample_id)
        limit = min(request.max_prompt_tokens or math.inf, self._engine.model.config.max_positions - 1)
        if len(run.sample) > limit:
            run.finish_reason = "too_long"
            run.sample.info |= {"prompt_tokens": len(run.sample), "limit": limit}
            run.pending = completed(None)
        return run

    def _encoded(self, episode: Episode) -> "Future[list[int]]":
        """The ids of an episode's prompt. A prompt that the chat template refuses ends its sample, not the run."""
        encode = functools.partial(
            encode_prompt, self._tokenizer, episode.messages, tools=episode.tools, enable_thinking=self._thinking
        )
        try:
            return completed(guarded("the prompt", encode))
        except EpisodeError as error:
            return failed(error)

    def _can_continue(self, partial: Sample, episode: Episode) -> bool:
        """Whether a new episode can continue a partial: the policy has had one turn, and no response to it."""
        written = partial.loss_mask[partial.prompt_length :]
        is_one_turn = len(written) > 0 and bool(written.all()) and not episode.stop and not episode.tools
        has_ended = partial.finish_reason in ENDED_BY_POLICY
        ends_turn = int(partial.token_ids[-1]) in self._engine.eos_ids if len(partial) else False
        return is_one_turn and not partial.earlier and (has_ended or not ends_turn)

    def poll(self) -> list[Sample | LateReward]:
        """Take one step of the engine. Without work for it, wait up to POLL_SECONDS for a call of an episode."""
        for state in self._engine.step():
            if state.finish_reason:
                self._end_turn(self._runs[state.request.id], state.completion())
        self._start_followers()
        self._calls.give_up_overdue()
        if not self._engine.has_work:
            pending = [run.pending for run in (*self._runs.values(), *self._scoring.values()) if run.pending]
            wait(pending, POLL_SECONDS, FIRST_COMPLETED)
        with_result = [run for run in self._runs.values() if run.has_result]
        finished: list[Sample | LateReward] = [
            self._late_reward(run) for run in list(self._scoring.values()) if run.has_result
        ]
        for run in with_result:
            sample = self._take_result(run)
            if sample is not None:
                del self._runs[run.id]
                finished.append(sample)
        return finished

    def cancel(self, sample_ids: list[str]) -> None:
        for sample_id in sample_ids:
            run = self._runs.pop(sample_id, None) or self._scoring.pop(sample_id, None)
            if run is not None:
                self._engine.abort(sample_id)
                if run.pending is not None:
                    run.pending.cancel()
                    run.pending.add_done_callback(episode_steps.close_unused)
                self._close(run)

    def interrupt(self) -> list[Sample]:
        """Stop samples in their first turn, of episodes without tools or stop strings."""
        interrupted = []
        for run in list(self._runs.values()):
            if not run.can_be_interrupted:
                continue
            state = self._engine.abort(run.id)
            if state is not None and len(state.tokens) > state.prompt_length:
                run.sample = with_completion(run.sample, state.completion())
            del self._runs[run.id]
            self._close(run)
            interrupted.append(run.sample)
        return interrupted

    def update_weights(self, version: int) -> None:
        self._engine.update_weights(self._weights(), version=version, recompute=False)

    def close(self) -> None:
        self.cancel([*self._runs, *self._scoring])
        self._engine.forget_cached()
        if self._owns_calls:
            self._calls.close()

    def _start_followers(self) -> None:
        waiting, self._followers = self._followers, []
        for leader, run in waiting:
            if leader.num_uncomputed_tokens > 1 and not leader.finish_reason:
                self._followers.append((leader, run))
            elif self._runs.get(run.id) is run:
                self._next_turn(run)

    def _next_turn(self, run: _Run, inserted: Iterable[int] = ()) -> RequestState | None:
        """Submit the policy's next turn, after the inserted tokens; without room for a token, the sample ends."""
        assert run.episode is not None
        inserted = list(inserted)
        max_tokens = min(
            run.request.max_answer_tokens - run.num_written,
            self._engine.model.config.max_positions - len(run.sample) - len(inserted),
        )
        if max_tokens <= 0:
            run.finish_reason = "length"
            run.pending = completed(UNSCORED) if self._late_rewards else self._score(run)
            return None
        run.sample = with_inserted(run.sample, inserted)
        params = SamplingParams(
            max_tokens=max_tokens,
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

    def _end_turn(self, run: _Run, completion: Completion) -> None:
        """Add the policy's turn to the sample, and pass it to the episode."""
        start = len(run.sample) if run.num_turns > 1 else run.sample.prompt_length
        run.sample = with_completion(run.sample, completion)
        run.finish_reason = completion.finish_reason
        if completion.finish_reason == "error":
            run.pending = failed(RuntimeError("the engine could not continue the sample"))
            return
        self._pass_turn(run, start=start)

    def _pass_turn(self, run: _Run, *, start: int) -> None:
        """Pass the policy's turn, which starts at token `start`, to the episode."""
        assert run.episode is not None
        written = run.sample.token_ids[start:].tolist()
        if written[-1] in self._engine.eos_ids:
            written = written[:-1]
        text = self._tokenizer.decode(written, skip_special=False)
        if self._thinking:
            text = without_thoughts(text, stop=run.episode.stop)
        score = not self._late_rewards
        run.pending = self._call(
            functools.partial(episode_steps.respond, run.episode, run.request, text, run.finish_reason, score=score)
        )

    def _take_result(self, run: _Run) -> Sample | None:
        """Act on the result of the episode's call. Returns the sample if it has ended."""
        error, result = self._result(run)
        if isinstance(result, EnvResponse):
            self._insert_response(run, result)
            return None
        if isinstance(result, Successor):
            self._replace_context(run, result.episode)
            return None
        if result is UNSCORED:
            self._engine.end_session(run.id)
            run.pending = self._score(run)
            self._scoring[run.id] = run
            return self._ended(run, math.nan, run.sample.info | {"turns": run.num_turns})
        self._close(run)
        if run.finish_reason == "too_long":
            return replace(run.sample, finish_reason="too_long")
        reward, verdict = self._verdict(run, error, result)
        info = run.sample.info | {"turns": run.num_turns} | verdict
        if math.isnan(reward):
            return replace(run.sample, finish_reason="error", reward=reward, info=info)
        return self._ended(run, reward, info)

    def _late_reward(self, run: _Run) -> LateReward:
        """The reward of a sample that was returned before."""
        del self._scoring[run.id]
        self._close(run)
        reward, info = self._verdict(run, *self._result(run))
        finish_reason = "error" if math.isnan(reward) else run.finish_reason
        info |= {"problem": run.request.problem.id}
        return LateReward(run.id, run.request.source, run.request.group_id, reward, finish_reason, info)

    def _result(self, run: _Run) -> tuple[BaseException | None, Any]:
        """The exception and the result of the episode's call. An invalid reward is raised: it ends the run."""
        assert run.pending is not None
        error = run.pending.exception()
        if isinstance(error, RewardError):
            raise error
        return error, None if error else run.pending.result()

    def _verdict(self, run: _Run, error: BaseException | None, reward: Any) -> tuple[float, dict[str, Any]]:
        """The reward, NaN after a failure, and its entries for the sample's info."""
        info: dict[str, Any] = {}
        if isinstance(error, EpisodeTimeoutError):
            info["timeout"] = True
            if self._timeout_reward is not None and run.num_written:
                return self._timeout_reward, info
        return (reward, info) if error is None else (math.nan, info | episode_steps.failure_info(error))

    def _ended(self, run: _Run, reward: float, info: dict[str, Any]) -> Sample:
        sample = replace(run.sample, finish_reason=run.finish_reason, reward=reward, info=info)
        if run.earlier:
            sample.episode = run.id
            sample.earlier = [replace(context, reward=reward, episode=run.id) for context in run.earlier]
        return sample

    def _insert_response(self, run: _Run, response: EnvResponse) -> None:
        """Submit the policy's next turn after the response."""
        run.pending = None
        try:
            inserted = guarded("respond", functools.partial(self._inserted_ids, response))
        except EpisodeError as error:
            run.pending = failed(error)
            return
        self._next_turn(run, inserted)

    def _inserted_ids(self, response: EnvResponse) -> list[int]:
        if response.messages:
            return turn_ids(self._tokenizer, response.messages, enable_thinking=self._thinking)
        return self._tokenizer.encode(response.text)

    def _replace_context(self, run: _Run, successor: Episode) -> None:
        """Make the sample an earlier context, and start the policy's turn after the new prompt."""
        self._engine.end_session(run.id)
        run.earlier.append(replace(run.sample, finish_reason="context"))
        run.episode, run.pending = successor, None
        encoded = self._encoded(successor)
        if encoded.exception() is not None:
            run.pending = encoded
            return
        run.sample = new_sample(encoded.result(), run.request, run.id)
        self._next_turn(run)

    def _score(self, run: _Run) -> "Future[Any]":
        assert run.episode is not None
        return self._call(functools.partial(episode_steps.reward_of, run.episode, run.request))

    def _call(self, function: Callable[[], Any]) -> "Future[Any]":
        return self._calls.submit(function, discard=episode_steps.close_late)

    def _close(self, run: _Run) -> None:
        self._engine.end_session(run.id)
        if run.episode is not None:
            self._calls.submit(functools.partial(episode_steps.close_episode, run.episode, run.request))


def _seed_of(*parts: int | str) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
