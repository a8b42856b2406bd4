"""Distillation in the training loop: the teachers of a run, their annotations of a batch, and the objective.

T packed tokens, N policy-written tokens, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from openmimo.core.errors import ConfigError
from openmimo.core.samples import Sample
from openmimo.model.mimo import MiMo
from openmimo.rl.algorithm import Algorithm
from openmimo.rl.config import MopdConfig
from openmimo.rl.learning.annotation import episode_lengths, is_learnable, lengths_of, numbers_of, write_annotations
from openmimo.rl.learning.policy_trainer import Forward, Objective, PolicyTrainer
from openmimo.rl.losses import normalize
from openmimo.rl.teaching.teachers import FOREIGN_KL, Teachers, distillation_objective, divergence_named

TOP_K = 64


class Distillation:
    """The teachers of a run, and their signal.

    Attributes:
        teachers: The teacher models by domain.
        objective: The objective that replaces the algorithm's token losses; None with signal "sampled".
    """

    def __init__(self, config: MopdConfig, student: MiMo, console: Console):
        """
        Raises:
            ConfigError: Teachers and domains do not match, or top_k is larger than the vocabulary.
            CheckpointError: A teacher has another vocabulary or chat template.
        """
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
            self.objective = distillation_objective(student, self.teachers, divergence, observe=self._add_divergence)

    def annotate(self, samples: list[Sample], trainer: PolicyTrainer, algorithm: Algorithm, options: Any) -> None:
        """Set advantages and weights of all samples; with signal "sampled", from the teachers' log-probabilities."""
        lowest = self._config.min_reward
        kept = [sample for sample in samples if is_learnable(sample) and (lowest is None or sample.reward >= lowest)]
        for sample in samples:
            sample.advantages, sample.weights = np.zeros(len(sample)), np.zeros(len(sample))
        if not kept:
            return
        if self._config.signal == "sampled":
            policy_logprobs = trainer.logprobs(kept)
            self.teachers.score(kept)
            self._add_sampled_divergence(kept, policy_logprobs)
            algorithm.annotate(kept, options, policy_logprobs)
            return
        lengths_B = lengths_of(kept)
        weights_N = normalize.sequence_weights(episode_lengths(kept))
        if options.balance_domains:
            weights_N = normalize.balance_domains(weights_N, lengths_B, numbers_of([sample.domain for sample in kept]))
        write_annotations(kept, torch.zeros_like(weights_N), weights_N)

    def metrics(self) -> dict[str, float]:
        """The mean divergence from the teacher of each domain since the last call, in nats per token."""
        values = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums.clear()
        if self._is_first:
            self._is_first = False
            self._print_initial(values)
        return values

    def _print_initial(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not name.startswith("teacher_kl/"):
                continue
            domain = name.removeprefix("teacher_kl/")
            self._console.print(f"{domain}: {value:.3f} nats a token from its teacher at the start", highlight=False)
            if value > FOREIGN_KL:
                self._console.print(
                    f"[yellow]warning:[/] the teacher of {domain} is far from the student, as a model of another "
                    "origin would be. Distillation from such a teacher tends to narrow or break the student; teachers "
                    "should be trained from the checkpoint that the student starts from."
                )

    def _add_divergence(self, domain: str, divergence_N: torch.Tensor, overlap: float) -> None:
        self._add(f"teacher_kl/{domain}", float(divergence_N.sum()), len(divergence_N))
        self._add(f"top_8_overlap/{domain}", overlap, 1)

    def _add_sampled_divergence(self, samples: list[Sample], policy_logprobs: list[np.ndarray]) -> None:
        for sample, logprobs in zip(samples, policy_logprobs, strict=True):
            gaps = (logprobs - sample.teacher_logprobs)[sample.loss_mask]
            self._add(f"teacher_kl/{sample.domain}", float(gaps.sum()), len(gaps))

    def _add(self, name: str, value: float, count: int) -> None:
        self._sums[name][0] += value
        self._sums[name][1] += count


def imitation(forward: Forward) -> torch.Tensor:
    """Cross-entropy on policy-written tokens: supervised fine-tuning on the teachers' responses."""
    return -(forward.batch.logprobs_N * forward.weights_N).sum()
