"""The rollouts of a run: by the engine of this process, by workers, or by the teachers."""

import functools

from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.model.mimo import MiMo
from openmimo.rl.agents.episode_calls import EpisodeCalls
from openmimo.rl.config import MopdConfig, RlConfig
from openmimo.rl.evaluate import episode_opener
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.rollouts.processes import ProcessRollouts
from openmimo.rl.rollouts.protocol import Rollouts
from openmimo.rl.rollouts.ray_workers import RayRollouts
from openmimo.rl.rollouts.worker import WorkerSetup
from openmimo.rl.teaching.teacher_rollouts import TeacherRollouts
from openmimo.rl.teaching.teachers import Teachers


def open_rollouts(
    config: RlConfig,
    model: MiMo,
    tokenizer: Tokenizer,
    engine: Engine,
    calls: EpisodeCalls,
    *,
    teachers: Teachers | None,
    version: int,
) -> Rollouts:
    """Start the rollouts that the config names.

    Args:
        config: The config of the run.
        model: The policy.
        tokenizer: The tokenizer of the policy.
        engine: An engine with the policy.
        calls: Runs the calls of episodes in this process.
        teachers: The teachers of a distillation run.
        version: The version of the policy's weights.
    """
    if isinstance(config, MopdConfig) and config.writer == "teacher":
        assert teachers is not None
        domains = [source.name for source in config.sources]
        open_engine = functools.partial(_engine_rollouts, config, calls, record_routing=False)
        rollouts = TeacherRollouts(teachers, tokenizer, config.engine, domains, open_engine)
        rollouts.update_weights(version)
        return rollouts
    if config.rollouts == "engine":
        return _engine_rollouts(config, calls, engine)
    setup = WorkerSetup(
        model.config,
        tokenizer,
        config.engine,
        functools.partial(episode_opener, config.sources),
        compute_dtype=model.compute_dtype,
        reward_threads=0 if calls.is_instant else config.reward_threads,
        environment_seconds=config.environment_seconds,
        timeout_reward=config.timeout_reward,
        thinking=config.thinking,
        seed=config.seed,
    )
    kind = ProcessRollouts if config.rollouts == "processes" else RayRollouts
    return kind(model, setup, num_workers=config.rollout_workers, version=version)


def _engine_rollouts(
    config: RlConfig, calls: EpisodeCalls, engine: Engine, *, record_routing: bool = True
) -> EngineRollouts:
    return EngineRollouts(
        engine,
        episode_opener(config.sources),
        calls=calls,
        timeout_reward=config.timeout_reward,
        seed=config.seed,
        record_routing=record_routing,
        thinking=config.thinking,
        late_rewards=not calls.is_instant,
    )
