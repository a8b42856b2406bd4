"""Rollouts by an engine of this process, in turns with the trainer."""

from openmimo.engine.engine import Engine
from openmimo.rl.evaluate import episode_opener
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.rollouts.protocol import RolloutBackend, RunParts


def engine_rollouts(parts: RunParts, engine: Engine, *, record_routing: bool = True) -> EngineRollouts:
    """Rollouts of a run by `engine`.

    Args:
        parts: The parts of the run.
        engine: An engine with the policy or with a teacher.
        record_routing: Whether samples have the routes of their tokens.
    """
    config = parts.config
    return EngineRollouts(
        engine,
        episode_opener(config.sources),
        calls=parts.calls,
        timeout_reward=config.timeout_reward,
        seed=config.seed,
        record_routing=record_routing,
        thinking=config.thinking,
        late_rewards=not parts.calls.is_instant,
    )


def _open(parts: RunParts) -> EngineRollouts:
    return engine_rollouts(parts, parts.engine)


PLUGIN = RolloutBackend(_open)
