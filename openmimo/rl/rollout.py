"""Rollouts: problems in, samples out, through an engine. Tokens in, tokens out: no text is ever tokenised again.

The engine samples; an episode answers each time the policy stops; what comes of it is one sample with a
log-probability, a policy version and, for a model with experts, the routes of every token. Turns of one sample share an
engine session, so that keys, values and routes of earlier turns stay those of the pass that sampled them (paper section
4.6.1).
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from openmimo.core.errors import ConfigError
from openmimo.core.records import Completion, Message, Request, SamplingParams
from openmimo.core.samples import Sample
from openmimo.data.conversation import encode_prompt
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.engine.sequence import Sequence
from openmimo.rl.environment import Answer, Episode, ReplacesContext
from openmimo.rl.groups import GroupRequest

NOT_SAMPLED = -1
POLL_SECONDS = 0.01

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

    def poll(self) -> list[Sample]:
        """Goes on a little, or waits a little. The samples that came to their end, scored; `group` is their group."""
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
    """One sample on its way."""

    id: str
    request: GroupRequest
    episode: Episode
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

    open_episode: from a request (its problem and source) to an episode. executor: where slow episodes answer (None: all
    are instant). seed: with a sample's id and its turn, decides its tokens. record_routing: keep the routes (R3).
    """

    def __init__(
        self,
        engine: Engine,
        open_episode: EpisodeOpener,
        *,
        executor: Executor | None = None,
        seed: int = 0,
        record_routing: bool = True,
        weights: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ):
        if engine.tokenizer is None:
            raise ConfigError("rollouts need an engine with a tokenizer: environments speak text.")
        self._engine, self._tokenizer = engine, engine.tokenizer
        self._open_episode, self._executor = open_episode, executor
        self._seed, self._weights = seed, weights
        self._record_routing = record_routing and engine.model.config.moe is not None
        self._runs: dict[str, _Run] = {}
        self._followers: list[tuple[Sequence, _Run]] = []  # and whom they wait for

    @property
    def num_running(self) -> int:
        """See Rollouts."""
        return len(self._runs)

    @property
    def is_instant(self) -> bool:
        """Whether episodes answer in this thread, so that the same requests give the same samples in the same order."""
        return self._executor is None

    def submit(self, request: GroupRequest) -> None:
        """See Rollouts. A partial is read again and goes on where it stopped; one of several turns begins anew.

        Samples of one prompt begin once the first of them has read it, so that the others find it in the cache.
        """
        prompts: dict[tuple[Message, ...], list[int]] = {}
        leaders: dict[tuple[int, ...], Sequence] = {}
        for sample_id in request.sample_ids:
            episode = self._open_episode(request)
            sample = request.partials.get(sample_id)
            if sample is None or not self._goes_on(sample, episode):
                if episode.messages not in prompts:
                    prompts[episode.messages] = encode_prompt(self._tokenizer, episode.messages, tools=episode.tools)
                sample = _new_sample(prompts[episode.messages], request, sample_id)
            run = _Run(sample_id, request, episode, replace(sample, finish_reason=""))
            self._runs[sample_id] = run
            prompt = tuple(sample.token_ids)
            if prompt in leaders:
                self._followers.append((leaders[prompt], run))
                continue
            sequence = self._next_turn(run)
            if sequence is not None and sequence.request.session is None and self._engine.config.prefix_cache:
                leaders[prompt] = sequence

    def poll(self) -> list[Sample]:
        """See Rollouts. Waits at most a hundredth of a second, if there is nothing to do but to wait for episodes."""
        for sequence in self._engine.step():
            if sequence.finish_reason:
                self._take_turn(self._runs[sequence.request.id], sequence.completion())
        self._begin_followers()
        if not self._engine.has_work:
            wait([run.pending for run in self._runs.values() if run.pending], POLL_SECONDS, FIRST_COMPLETED)
        ended = [run for run in self._runs.values() if run.pending is not None and run.pending.done()]
        finished = []
        for run in ended:
            sample = self._answered(run)
            if sample is not None:
                del self._runs[run.id]
                finished.append(sample)
        return finished

    def cancel(self, sample_ids: list[str]) -> None:
        """See Rollouts."""
        for sample_id in sample_ids:
            run = self._runs.pop(sample_id, None)
            if run is not None:
                self._engine.abort(sample_id)
                if run.pending is not None:
                    run.pending.cancel()
                    run.pending.add_done_callback(_close_successor)
                self._close(run)

    def update_weights(self, version: int) -> None:
        """See Rollouts."""
        self._engine.update_weights(self._weights(), version=version, recompute=False)

    def close(self) -> None:
        """See Rollouts."""
        self.cancel(list(self._runs))
        self._engine.forget_cached()

    def _goes_on(self, partial: Sample, episode: Episode) -> bool:
        """Whether a new episode can take it: it has heard nothing of what an earlier one was told."""
        written = partial.loss_mask[_prompt_length(partial) :]
        is_one_turn = bool(written) and all(written) and not episode.stop and not episode.tools
        return is_one_turn and not partial.earlier and partial.token_ids[-1] not in self._engine.eos_ids

    def _begin_followers(self) -> None:
        waiting, self._followers = self._followers, []
        for leader, run in waiting:
            if leader.remaining > 1 and not leader.finish_reason:
                self._followers.append((leader, run))
            elif run.id in self._runs:
                self._next_turn(run)

    def _next_turn(self, run: _Run, inserted: Iterable[int] = ()) -> Sequence | None:
        """Asks the engine for the policy's next turn, after what was inserted; ends the sample if no token is left."""
        inserted = list(inserted)
        room = min(
            run.request.max_answer_tokens - run.num_written,
            self._engine.model.config.max_positions - len(run.sample.token_ids) - len(inserted),
        )
        if room <= 0:
            run.finish_reason = "length"
            run.pending = self._call(run, functools.partial(_reward, run.episode))
            return None
        run.sample = _with_inserted(run.sample, inserted)
        params = SamplingParams(
            max_tokens=room,
            temperature=run.request.temperature,
            seed=_seed_of(self._seed, run.context_id, len(run.sample.token_ids), self._engine.policy_version),
            stop=run.episode.stop,
            logprobs=True,
            routed_experts=self._record_routing,
            skip_special_tokens=False,
        )
        session = run.id if run.num_turns or run.episode.stop or run.episode.tools else None
        run.num_turns += 1
        request = Request(run.id, tuple(run.sample.token_ids), params, run.request.priority, session=session)
        return self._engine.submit(request)

    def _take_turn(self, run: _Run, completion: Completion) -> None:
        """Adds the policy's turn to the sample, and hands it to the episode."""
        start = len(run.sample.token_ids) if run.num_turns > 1 else _prompt_length(run.sample)
        run.sample = _extended(run.sample, completion)
        run.finish_reason = completion.finish_reason
        if completion.finish_reason == "error":
            run.pending = _done(None)
            return
        written = run.sample.token_ids[start:]
        if written[-1] in self._engine.eos_ids:
            written = written[:-1]
        text = self._tokenizer.decode(written, skip_special=False)
        run.pending = self._call(run, functools.partial(_respond, run.episode, text, completion.finish_reason))

    def _answered(self, run: _Run) -> Sample | None:
        """What the episode said: another turn or context (None), or the finished sample."""
        error = run.pending.exception()
        answer = None if error else run.pending.result()
        if isinstance(answer, Answer):
            run.pending = None
            self._next_turn(run, self._inserted_ids(answer))
            return None
        if isinstance(answer, _Successor):
            self._replace_context(run, answer.episode)
            return None
        self._close(run)
        failed = error is not None or answer is None
        reason = "error" if failed else run.finish_reason
        info = run.sample.info | {"turns": run.num_turns} | ({"error": repr(error)} if error else {})
        reward = float("nan") if failed else answer
        sample = replace(run.sample, finish_reason=reason, reward=reward, info=info)
        if run.earlier and not failed:
            sample.episode = run.id
            sample.earlier = [replace(context, reward=reward, episode=run.id) for context in run.earlier]
        return sample

    def _replace_context(self, run: _Run, successor: Episode) -> None:
        """The sample so far becomes an earlier one, and the policy reads a new prompt."""
        self._engine.end_session(run.id)
        run.earlier.append(replace(run.sample, finish_reason="context"))
        run.episode, run.pending = successor, None
        try:
            prompt = encode_prompt(self._tokenizer, successor.messages, tools=successor.tools)
        except Exception as error:  # what an episode says may fit no template; it ends its sample, never the run
            run.pending = Future()
            run.pending.set_exception(error)
            return
        run.sample = _new_sample(prompt, run.request, run.id)
        self._next_turn(run)

    def _inserted_ids(self, answer: Answer) -> list[int]:
        if answer.messages:
            return turn_ids(self._tokenizer, answer.messages)
        return self._tokenizer.encode(answer.text)

    def _call(self, run: _Run, function: Callable[[], Any]) -> "Future[Any]":
        if self._executor is not None:
            return self._executor.submit(function)
        future: Future[Any] = Future()
        try:
            future.set_result(function())
        except Exception as error:  # an environment's failure ends its sample, never the run
            future.set_exception(error)
        return future

    def _close(self, run: _Run) -> None:
        self._engine.end_session(run.id)
        self._call(run, run.episode.close)


def turn_ids(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> list[int]:
    """The ids of turns that follow an answer of the policy, up to its next turn; its own end of turn is not in them."""
    before = [Message("system"), Message("user", "x"), Message("assistant", "y")]
    told = tokenizer.encode_chat(before, add_generation_prompt=False)
    asked = tokenizer.encode_chat([*before, *messages])
    if asked[: len(told)] != told:
        raise ConfigError(
            "the chat template changes earlier turns when later ones come; it cannot be used for rollouts."
        )
    return asked[len(told) :]


@dataclass(frozen=True)
class _Successor:
    """The episode that goes on in another context."""

    episode: Episode


def _close_successor(pending: "Future[Any]") -> None:
    """Nobody will play it."""
    if not pending.cancelled() and not pending.exception() and isinstance(pending.result(), _Successor):
        pending.result().episode.close()


def _reward(episode: Episode) -> float:
    return float(episode.reward())


def _respond(episode: Episode, text: str, finish_reason: str) -> Answer | _Successor | float:
    """The episode's next answer; the episode that goes on in another context; or the reward, if that was its last.

    It is also its last if the policy may write no more.
    """
    answer = episode.respond(text)
    if not answer.is_last and finish_reason == "stop":
        return answer
    if finish_reason == "stop" and isinstance(episode, ReplacesContext):
        successor = episode.successor()
        if successor is not None:
            return _Successor(successor)
    return _reward(episode)


def _new_sample(token_ids: list[int], request: GroupRequest, sample_id: str) -> Sample:
    length = len(token_ids)
    return Sample(
        token_ids=list(token_ids),
        loss_mask=[False] * length,
        logprobs=[0.0] * length,
        versions=[NOT_SAMPLED] * length,
        domain=request.source,
        group=request.group_id,
        temperature=request.temperature,
        info={"sample_id": sample_id, "problem": request.problem.id},
    )


def _extended(sample: Sample, completion: Completion) -> Sample:
    """The sample with what the engine wrote. Routes that were recorded before stay those of the pass that sampled."""
    new = len(completion.token_ids)
    routes = completion.routed_experts
    if routes is not None and sample.routed_experts is not None:
        routes = np.concatenate([sample.routed_experts, routes[len(sample.routed_experts) :]])
    return replace(
        sample,
        token_ids=sample.token_ids + completion.token_ids,
        loss_mask=sample.loss_mask + [True] * new,
        logprobs=sample.logprobs + list(completion.logprobs or []),
        versions=sample.versions + completion.policy_versions,
        routed_experts=routes,
    )


def _with_inserted(sample: Sample, token_ids: list[int]) -> Sample:
    length = len(token_ids)
    return replace(
        sample,
        token_ids=sample.token_ids + token_ids,
        loss_mask=sample.loss_mask + [False] * length,
        logprobs=sample.logprobs + [0.0] * length,
        versions=sample.versions + [NOT_SAMPLED] * length,
    )


def _prompt_length(sample: Sample) -> int:
    return sample.loss_mask.index(True) if True in sample.loss_mask else len(sample.loss_mask)


def _seed_of(*parts: int | str) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _done(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(value)
    return future
