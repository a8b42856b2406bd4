"""Evaluation of a policy on held-out problems of each source."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from openmimo.core.errors import UserError
from openmimo.core.samples import Sample
from openmimo.data.source import Split
from openmimo.engine.engine import Engine
from openmimo.rl.agents.environment import Episode, open_environment
from openmimo.rl.agents.episode_calls import EpisodeCalls
from openmimo.rl.config import RlSource
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.scheduling.groups import GroupRequest
from openmimo.rl.scheduling.problems import Problem


def streams_of(sources: tuple[RlSource, ...], split: Split, seed: int) -> dict[str, Callable[[int], Problem]]:
    """By source, the function from an index to a problem. Raises ConfigError or DataError if a source has none."""
    streams = {}
    for source in sources:
        environment, options = open_environment(source.environment, source.options)
        streams[source.name] = environment.problems(options, split, seed)
        streams[source.name](0)
    return streams


def episode_opener(sources: tuple[RlSource, ...]) -> Callable[[GroupRequest], Episode]:
    """A function that opens the episode of a request in the environment of its source."""
    opened = {source.name: open_environment(source.environment, source.options) for source in sources}

    def open_episode(request: GroupRequest) -> Episode:
        environment, options = opened[request.source]
        return environment.open(request.problem, options)

    return open_episode


@dataclass
class Evaluation:
    """The rewards of held-out problems.

    Attributes:
        rewards: By source, the reward of each problem; 0.0 for a problem that failed or is too long.
        num_errors: By source, the problems that failed in the environment.
        num_too_long: By source, the problems whose prompt is too long.
        first_failure: By source, a description of the first of these.
    """

    rewards: dict[str, list[float]] = field(default_factory=dict)
    num_errors: Counter[str] = field(default_factory=Counter)
    num_too_long: Counter[str] = field(default_factory=Counter)
    first_failure: dict[str, str] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """The mean reward of each source."""
        return {name: sum(values) / len(values) for name, values in self.rewards.items()}

    def failures(self) -> dict[str, str]:
        """By source, a message about its problems without a reward; only sources that have some."""
        return {
            name: f"{self.num_errors[name]} of {len(self.rewards[name])} held-out problems of source {name!r} failed "
            f"and {self.num_too_long[name]} have too long prompts; they count as 0. The first: {text}."
            for name, text in self.first_failure.items()
        }

    def refuse_if_all_failed(self) -> None:
        """Raises UserError for a source without a reward for any problem."""
        for name, text in self.first_failure.items():
            if self.num_errors[name] + self.num_too_long[name] == len(self.rewards[name]):
                raise UserError(
                    f"none of the {len(self.rewards[name])} held-out problems of source {name!r} could be scored. The "
                    f"first: {text}."
                )


HeldOut = dict[str, dict[int, Sample]]  # by source and index of the problem


def evaluate_policy(
    engine: Engine,
    sources: tuple[RlSource, ...],
    *,
    problems: int,
    seed: int,
    temperature: float = 0.0,
    calls: EpisodeCalls | None = None,
    timeout_reward: float | None = None,
    thinking: bool = False,
) -> Evaluation:
    """Roll out the first held-out problems of each source, and evaluate them.

    Args:
        engine: The engine with the policy.
        sources: The sources.
        problems: The number of problems of each source.
        seed: The seed of the problems and of sampling.
        temperature: The sampling temperature (0: greedy).
        calls: See EngineRollouts, as for the arguments below.
        timeout_reward: The reward of an episode that exceeds its deadline.
        thinking: Let the policy think.

    Raises:
        UserError: A source has no reward for any problem.
    """
    samples = roll_out_held_out(
        engine, sources, problems=range(problems), seed=seed, temperature=temperature, calls=calls,
        timeout_reward=timeout_reward, thinking=thinking,
    )  # fmt: skip
    return evaluation_of(samples)


def roll_out_held_out(
    engine: Engine,
    sources: tuple[RlSource, ...],
    *,
    problems: Sequence[int],
    seed: int,
    temperature: float,
    calls: EpisodeCalls | None,
    timeout_reward: float | None,
    thinking: bool,
) -> HeldOut:
    """Roll out the held-out problems of these indices of each source. Arguments as in `evaluate_policy`."""
    rollouts = EngineRollouts(
        engine, episode_opener(sources), calls=calls, timeout_reward=timeout_reward, seed=seed, record_routing=False,
        thinking=thinking,
    )  # fmt: skip
    streams = streams_of(sources, "validation", seed)
    for source in sources:
        for index in problems:
            rollouts.submit(_request(source, streams[source.name](index), index, temperature))
    samples: HeldOut = {source.name: {} for source in sources}
    while rollouts.num_running:
        for sample in rollouts.poll():
            assert isinstance(sample, Sample), "rewards are late only with late_rewards"
            samples[sample.domain][int(sample.group.rpartition("/")[2])] = sample
    rollouts.close()
    return samples


def evaluation_of(samples: HeldOut) -> Evaluation:
    """The rewards of held-out problems. Raises UserError for a source without a reward for any problem."""
    evaluation = Evaluation()
    for name, by_index in samples.items():
        evaluation.rewards[name] = [_reward(by_index[index], evaluation) for index in sorted(by_index)]
    evaluation.refuse_if_all_failed()
    return evaluation


def _request(source: RlSource, problem: Problem, index: int, temperature: float) -> GroupRequest:
    sample_id = f"{source.name}/evaluation/{index}"
    return GroupRequest(
        sample_id, source.name, problem, (sample_id,), {}, temperature, source.max_answer_tokens, 0,
        max_prompt_tokens=source.max_prompt_tokens, environment=source.environment,
    )  # fmt: skip


def _reward(sample: Sample, evaluation: Evaluation) -> float:
    """The reward of a sample. 0.0, and counted in the evaluation, if it has none."""
    name = sample.domain
    if sample.finish_reason not in ("error", "too_long"):
        return sample.reward
    if sample.finish_reason == "error":
        evaluation.num_errors[name] += 1
        text = str(sample.info.get("error", "the cause is not known"))
    else:
        evaluation.num_too_long[name] += 1
        text = f"its prompt has {sample.info['prompt_tokens']} tokens, and at most {sample.info['limit']} are allowed"
    evaluation.first_failure.setdefault(name, f"problem {sample.info['problem']}: {text}")
    return 0.0
