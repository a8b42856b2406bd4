"""What distillation adds to the loop: teachers, what they say of a batch, and the objective that follows from it.

T packed tokens, N policy-written tokens, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from openmimo.core.errors import ConfigError
from openmimo.core.samples import Sample
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.model.mimo import MiMo
from openmimo.rl.algorithm import Algorithm
from openmimo.rl.config import MopdConfig
from openmimo.rl.learning.annotation import episode_lengths, is_learnable, lengths_of, numbers_of, write_annotations
from openmimo.rl.learning.policy_trainer import Forward, Objective, PolicyTrainer
from openmimo.rl.losses import normalize as normalize
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.scheduling.groups import GroupRequest, LateReward
from openmimo.rl.teaching.teachers import FOREIGN_KL, Teachers, distillation_objective, divergence_named

TOP_K = 64


class Teaching:
    """The teachers of a run, and how they teach."""

    def __init__(self, config: MopdConfig, student: MiMo, console: Console):
        self._config, self._console = config, console
        self.teachers = Teachers(
            config.teachers,
            domains=[source.name for source in config.sources],
            student=Path(config.checkpoint),
            device=student.device,
            tokens_per_microbatch=config.tokens_per_microbatch,
        )
        self.teachers.set_compute_dtype(student.compute_dtype)
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._is_first = True
        self.objective: Objective | None = None
        if config.signal == "imitate":
            self.objective = imitation
        elif config.signal != "sampled":
            if config.top_k is not None and config.top_k > student.config.vocab_size:
                raise ConfigError(f"top_k is {config.top_k}; the vocabulary has {student.config.vocab_size} tokens.")
            divergence = divergence_named(config.signal, config.top_k or TOP_K)
            self.objective = distillation_objective(student, self.teachers, divergence, watch=self._watch)

    def annotate(self, samples: list[Sample], trainer: PolicyTrainer, algorithm: Algorithm, options: Any) -> None:
        """Says of every sample what it counts, and with signal sampled what its teacher thinks of each token."""
        lowest = self._config.min_reward
        kept = [sample for sample in samples if is_learnable(sample) and (lowest is None or sample.reward >= lowest)]
        for sample in samples:
            sample.advantages, sample.weights = np.zeros(len(sample)), np.zeros(len(sample))
        if not kept:
            return
        if self._config.signal == "sampled":
            policy = trainer.logprobs(kept)
            self.teachers.score(kept)
            self._watch_sampled(kept, policy)
            algorithm.annotate(kept, options, policy)
            return
        lengths_B = lengths_of(kept)
        weights_N = normalize.sequence_weights(episode_lengths(kept))
        if options.balance_domains:
            weights_N = normalize.balance_domains(weights_N, lengths_B, numbers_of([sample.domain for sample in kept]))
        write_annotations(kept, torch.zeros_like(weights_N), weights_N)

    def metrics(self) -> dict[str, float]:
        """Per domain, the mean divergence from its teacher in the last step, in nats a token; forgets them."""
        values = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums.clear()
        if self._is_first:
            self._is_first = False
            self._say_initial(values)
        return values

    def _say_initial(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not name.startswith("teacher_kl/"):
                continue
            domain = name.removeprefix("teacher_kl/")
            self._console.print(f"{domain}: {value:.3f} nats a token from its teacher at the start", highlight=False)
            if value > FOREIGN_KL:
                self._console.print(
                    f"[yellow]warning:[/] the teacher of {domain} is far from the student, as one of another origin "
                    "would be. Distilling from such a teacher tends to narrow or break the student; teachers should be "
                    "children of the checkpoint that the student starts from."
                )

    def _watch(self, domain: str, divergence_N: torch.Tensor, overlap: float) -> None:
        self._add(f"teacher_kl/{domain}", float(divergence_N.sum()), len(divergence_N))
        self._add(f"top_8_overlap/{domain}", overlap, 1)

    def _watch_sampled(self, samples: list[Sample], policy: list[np.ndarray]) -> None:
        for sample, own in zip(samples, policy, strict=True):
            gaps = (own - sample.teacher_logprobs)[sample.loss_mask]
            self._add(f"teacher_kl/{sample.domain}", float(gaps.sum()), len(gaps))

    def _add(self, name: str, value: float, count: int) -> None:
        self._sums[name][0] += value
        self._sums[name][1] += count


def imitation(forward: Forward) -> torch.Tensor:
    """Cross-entropy on what was written: supervised fine-tuning on the teachers' answers."""
    return -(forward.batch.logprobs_N * forward.weights_N).sum()


class TeacherRollouts:
    """The teachers write: each source by an engine of its own teacher (off-policy distillation)."""

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
        """See Rollouts."""
        return sum(rollouts.num_running for rollouts in self._engines)

    def submit(self, request: GroupRequest) -> None:
        """See Rollouts."""
        self._by_domain[request.source].submit(request)

    @property
    def num_unscored(self) -> int:
        """See Rollouts."""
        return sum(rollouts.num_unscored for rollouts in self._engines)

    def interrupt(self) -> list[Sample]:
        """See Rollouts."""
        return [sample for rollouts in self._engines for sample in rollouts.interrupt()]

    def poll(self) -> list[Sample | LateReward]:
        """See Rollouts."""
        return [sample for rollouts in self._engines for sample in rollouts.poll()]

    def cancel(self, sample_ids: list[str]) -> None:
        """See Rollouts."""
        for rollouts in self._engines:
            rollouts.cancel(sample_ids)

    def update_weights(self, version: int) -> None:
        """The student's new weights change nothing for its teachers; their samples count as the version's."""
        for rollouts in self._engines:
            rollouts.update_weights(version)

    def close(self) -> None:
        """See Rollouts."""
        for rollouts in self._engines:
            rollouts.close()
