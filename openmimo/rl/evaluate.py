"""How good a policy is: greedy answers to held-out problems of every source."""

from collections import Counter
from collections.abc import Callable
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
    """The problems of every source, by index. Raises ConfigError or DataError for settings that make none."""
    streams = {}
    for source in sources:
        environment, options = open_environment(source.environment, source.options)
        streams[source.name] = environment.problems(options, split, seed)
        streams[source.name](0)
    return streams


def episode_opener(sources: tuple[RlSource, ...]) -> Callable[[GroupRequest], Episode]:
    """Opens the episode of a request by its source."""
    opened = {source.name: open_environment(source.environment, source.options) for source in sources}

    def open_episode(request: GroupRequest) -> Episode:
        environment, options = opened[request.source]
        return environment.open(request.problem, options)

    return open_episode


@dataclass
class Evaluation:
    """The reward of each held-out problem, by source; 0.0 where there is none.

    Attributes:
        rewards: By source, in the order of the problems.
        num_errors: By source, how many were lost to failures of its environment.
        num_too_long: By source, how many prompts were too long.
        first_failure: By source, what happened to the first of these.
    """

    rewards: dict[str, list[float]] = field(default_factory=dict)
    num_errors: Counter[str] = field(default_factory=Counter)
    num_too_long: Counter[str] = field(default_factory=Counter)
    first_failure: dict[str, str] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """The mean reward of each source."""
        return {name: sum(values) / len(values) for name, values in self.rewards.items()}

    def failures(self) -> dict[str, str]:
        """A sentence for each source that has no reward for some problem."""
        return {
            name: f"{self.num_errors[name]} of {len(self.rewards[name])} held-out problems of source {name!r} failed "
            f"and {self.num_too_long[name]} have too long prompts; they count as 0. The first: {text}."
            for name, text in self.first_failure.items()
        }

    def refuse_if_all_failed(self) -> None:
        """Raises UserError for a source that has a reward for no problem at all."""
        for name, text in self.first_failure.items():
            if self.num_errors[name] + self.num_too_long[name] == len(self.rewards[name]):
                raise UserError(
                    f"none of the {len(self.rewards[name])} held-out problems of source {name!r} could be scored. The "
                    f"first: {text}."
                )


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
    """Answers the first `problems` held-out problems of each source.

    calls, timeout_reward, thinking: see EngineRollouts. Raises UserError if a source has a reward for no problem.
    """
    rollouts = EngineRollouts(
        engine, episode_opener(sources), calls=calls, timeout_reward=timeout_reward, seed=seed, record_routing=False,
        thinking=thinking,
    )  # fmt: skip
    streams = streams_of(sources, "validation", seed)
    for source in sources:
        for index in range(problems):
            rollouts.submit(_request(source, streams[source.name](index), index, temperature))
    samples: dict[str, dict[int, Sample]] = {source.name: {} for source in sources}
    while rollouts.num_running:
        for sample in rollouts.poll():
            samples[sample.domain][int(sample.group.rpartition("/")[2])] = sample
    rollouts.close()
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
    """The reward of a sample; 0.0, and counted, if it has none."""
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
