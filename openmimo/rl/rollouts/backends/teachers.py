"""Rollouts in which the teachers write (off-policy distillation)."""

from openmimo.core.samples import Sample
from openmimo.engine.engine import Engine
from openmimo.rl.rollouts.backends.engine import engine_rollouts
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.rollouts.protocol import RolloutBackend, RunParts
from openmimo.rl.scheduling.groups import GroupRequest, LateReward


class TeacherRollouts:
    """Rollouts of each source by an engine with the teacher of that source."""

    repeats_exactly = False
    runs_while_learning = False

    def __init__(self, parts: RunParts):
        """
        Args:
            parts: The parts of a run with teachers.
        """
        assert parts.teachers is not None, "only a distillation run has this backend"
        engines: dict[int, EngineRollouts] = {}
        self._by_domain = {}
        for source in parts.config.sources:
            model = parts.teachers.model(source.name)
            if id(model) not in engines:
                engine = Engine(model, parts.tokenizer, parts.config.engine)
                engines[id(model)] = engine_rollouts(parts, engine, record_routing=False)
            self._by_domain[source.name] = engines[id(model)]
        self._engines = list(engines.values())
        self.update_weights(parts.version)

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


PLUGIN = RolloutBackend(TeacherRollouts)
