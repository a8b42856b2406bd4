"""How good a policy is: greedy answers to held-out problems of every source."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor

from openmimo.data.source import Split
from openmimo.engine.engine import Engine
from openmimo.rl.config import RlSource
from openmimo.rl.environment import Episode, open_environment
from openmimo.rl.groups import GroupRequest
from openmimo.rl.problems import Problem
from openmimo.rl.rollout import EngineRollouts


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


def evaluate_policy(
    engine: Engine,
    sources: tuple[RlSource, ...],
    *,
    problems: int,
    seed: int,
    temperature: float = 0.0,
    executor: Executor | None = None,
) -> dict[str, list[float]]:
    """The reward of each of the first `problems` held-out problems, by source. A failed one counts as 0.

    executor: where slow episodes answer (None: in this thread).
    """
    rollouts = EngineRollouts(engine, episode_opener(sources), executor=executor, seed=seed, record_routing=False)
    streams = streams_of(sources, "validation", seed)
    rewards: dict[str, dict[int, float]] = {source.name: {} for source in sources}
    for source in sources:
        for index in range(problems):
            sample_id = f"{source.name}/evaluation/{index}"
            problem = streams[source.name](index)
            rollouts.submit(
                GroupRequest(
                    sample_id, source.name, problem, (sample_id,), {}, temperature, source.max_answer_tokens, 0
                )
            )
    while rollouts.num_running:
        for sample in rollouts.poll():
            index = int(sample.group.rpartition("/")[2])
            rewards[sample.domain][index] = 0.0 if sample.finish_reason == "error" else sample.reward
    rollouts.close()
    return {name: [by_index[index] for index in sorted(by_index)] for name, by_index in rewards.items()}


def mean_rewards(rewards: Mapping[str, list[float]]) -> dict[str, float]:
    """The mean of each source."""
    return {name: sum(values) / len(values) for name, values in rewards.items()}
