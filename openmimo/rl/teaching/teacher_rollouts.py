"""Rollouts in which the teachers write (off-policy distillation)."""

from collections.abc import Callable

from openmimo.core.samples import Sample
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.scheduling.groups import GroupRequest, LateReward
from openmimo.rl.teaching.teachers import Teachers


class TeacherRollouts:
    """Rollouts of each source by an engine with the teacher of that source."""

    repeats_exactly = False
    runs_while_learning = False

    def __init__(
        self,
        teachers: Teachers,
        tokenizer: Tokenizer,
        config: EngineConfig,
        domains: list[str],
        open_rollouts: Callable[[Engine], EngineRollouts],
    ):
        engines: dict[int, EngineRollouts] = {}
        self._by_domain = {}
        for domain in domains:
            model = teachers.model(domain)
            if id(model) not in engines:
                engines[id(model)] = open_rollouts(Engine(model, tokenizer, config))
            self._by_domain[domain] = engines[id(model)]
        self._engines = list(engines.values())

    @property
    def num_running(self) -> int:
        return sum(rollouts.num_running for rollouts in self._engines)

    @property
    def num_unscored(self) -> int:
        return sum(rollouts.num_unscored for rollouts in self._engines)

    def submit(self, request: GroupRequest) -> None:
        self._by_domain[request.source].submit(request)

    def poll(self) -> list[Sample | LateReward]:
        return [item for rollouts in self._engines for item in rollouts.poll()]

    def interrupt(self) -> list[Sample]:
        return [sample for rollouts in self._engines for sample in rollouts.interrupt()]

    def cancel(self, sample_ids: list[str]) -> None:
        for rollouts in self._engines:
            rollouts.cancel(sample_ids)

    def update_weights(self, version: int) -> None:
        """Teachers keep their weights; their samples count as samples of this version."""
        for rollouts in self._engines:
            rollouts.update_weights(version)

    def metrics(self) -> dict[str, float]:
        """Engines of this process have no metrics of their own."""
        return {}

    def close(self) -> None:
        for rollouts in self._engines:
            rollouts.close()
