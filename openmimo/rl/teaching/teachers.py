"""Distillation: a teacher for each domain, their scores of the student's tokens, and the objective (section 4.4).

A teacher has the student's vocabulary, and makes one forward pass over finished samples. Domains with the same
checkpoint share one model. The teacher "self" is the checkpoint that the student started from: it keeps a domain
without an expert at its initial level.

T packed tokens, N policy-written tokens, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch.utils.checkpoint import checkpoint

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.samples import Sample
from openmimo.data.tokenizer import Tokenizer
from openmimo.kernels.operations import linear
from openmimo.model.hf import load_model
from openmimo.model.mimo import MiMo
from openmimo.rl.algorithm import Algorithm
from openmimo.rl.config import MopdConfig
from openmimo.rl.learning.annotation import episode_lengths, is_learnable, lengths_of, numbers_of, write_annotations
from openmimo.rl.learning.packing import PackedSamples
from openmimo.rl.learning.policy_trainer import Forward, Objective, score_samples
from openmimo.rl.losses import distillation, normalize
from openmimo.rl.losses.tokens import top_k_overlap

SELF = "self"
TILE_ROWS = 512
OVERLAP_TOKENS = 8
FOREIGN_KL = 1.5  # nats per token; models trained from one checkpoint measured 0.3 to 0.9 (docs/rl.md)


class Teachers:
    """The teachers of a run, by domain."""

    def __init__(
        self,
        paths: Mapping[str, str],
        *,
        domains: list[str],
        student: Path,
        device: torch.device,
        tokens_per_microbatch: int = 8192,
        placement: str = "resident",
        shard: Callable[[MiMo], None] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        """
        Args:
            paths: By domain, the checkpoint folder of its teacher, or "self".
            domains: The domains of the run.
            student: The checkpoint that the student starts from.
            device: The device of the teachers.
            tokens_per_microbatch: Packed tokens of a forward pass; one sample may have more.
            placement: resident: this process keeps all teachers; turns: it loads a teacher when it is used, in place of
                the one before; spread: it keeps those that it owns; sharded: it keeps a part of each.
            shard: Distributes a teacher over the processes of the run in place; required if sharded.
            rank: The number of this process.
            num_ranks: The number of processes.

        Raises:
            ConfigError: A domain has no teacher, or a teacher no domain.
            CheckpointError: A teacher has another vocabulary or chat template, so that it would score other texts.
        """
        missing, unused = sorted(set(domains) - set(paths)), sorted(set(paths) - set(domains))
        if missing or unused:
            raise ConfigError(
                f"teachers: domains without a teacher: {', '.join(missing) or 'none'}; teachers of no domain: "
                f"{', '.join(unused) or 'none'}. Name a checkpoint folder for each domain, or {SELF!r} for the "
                "checkpoint that the student starts from."
            )
        self._tokens_per_microbatch = tokens_per_microbatch
        self._folders = {domain: student if path == SELF else Path(path) for domain, path in paths.items()}
        student_tokenizer = Tokenizer.load(student)
        self._device, self._placement, self._shard = device, placement, shard
        self._compute_dtype: torch.dtype | None = None
        self._models: dict[Path, MiMo] = {}
        for domain, folder in self._folders.items():
            _check_tokenizer(domain, folder, student_tokenizer)
        folders = list(dict.fromkeys(folder.resolve() for folder in self._folders.values()))
        self._owners = {folder: number % num_ranks for number, folder in enumerate(folders)}
        if placement != "turns":
            for domain in paths:
                if placement != "spread" or self.owner(domain) == rank:
                    self.model(domain)

    def owner(self, domain: str) -> int:
        """The process that has the teacher of a domain if teachers are spread."""
        return self._owners[self._folders[domain].resolve()]

    def model(self, domain: str) -> MiMo:
        """The teacher of a domain. Loads it if it is not there."""
        folder = self._folders[domain].resolve()
        if folder not in self._models:
            if self._placement == "turns":
                self._models.clear()  # before the next one needs its memory
            self._models[folder] = self._load(folder)
        return self._models[folder]

    def _load(self, folder: Path) -> MiMo:
        model = load_model(folder, dtype="float32", device=str(self._device)).requires_grad_(False)
        model.compute_dtype = self._compute_dtype
        if self._placement == "sharded":
            assert self._shard is not None, "several processes"
            self._shard(model)
        return model

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Set the dtype of activations to the student's, so that a self-teacher has the student's log-probabilities."""
        self._compute_dtype = dtype
        for model in self._models.values():
            model.compute_dtype = dtype

    def _read_weight(self, states_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """The weight of an output head. A sharded head frees its memory after the call, so it is copied."""
        return weight_VD.clone() if self._placement == "sharded" else weight_VD

    def score(self, samples: list[Sample]) -> None:
        """Set `teacher_logprobs`: the log-probability of each policy-written token at the sample's temperature.

        The recorded routes of the student are not replayed; each teacher uses its own routers.
        """
        for domain in dict.fromkeys(sample.domain for sample in samples):
            of_domain = [sample for sample in samples if sample.domain == domain]
            scores = score_samples(
                self.model(domain), of_domain, tokens_per_microbatch=self._tokens_per_microbatch, replay=False
            )
            for sample, logprobs in zip(of_domain, scores, strict=True):
                sample.teacher_logprobs = logprobs

    @torch.no_grad()
    def states(self, pack: PackedSamples) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher of a pack: its states [N, D] that predict the policy-written tokens, and its output head [V, D].

        Both have the dtype of the teacher's activations.
        """
        model = self.model(pack.samples[0].domain)
        hidden = model(pack.tokens_T, pack.context())
        teacher_ND = hidden.post_norm_TD[pack.rows_N]
        return teacher_ND, model.head(teacher_ND, self._read_weight)


Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Observe = Callable[[str, torch.Tensor, float], None]


def divergence_named(signal: str, top_k: int) -> Divergence:
    """The divergence of a signal, from logits [N, V] of student and teacher to [N].

    Args:
        signal: "full" and "forward" are the reverse and the forward KL over the vocabulary; "top_k" is the corrected
            reverse KL over the teacher's likeliest tokens.
        top_k: The number of these tokens.
    """
    if signal == "top_k":

        def of_top_k(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
            return distillation.top_k_reverse_kl(student_NV, *distillation.teacher_top_k(teacher_NV, top_k))

        return of_top_k
    return {"full": distillation.reverse_kl, "forward": distillation.forward_kl}[signal]


def distillation_objective(student: MiMo, teachers: Teachers, divergence: Divergence, *, observe: Observe) -> Objective:
    """The divergence from the domain's teacher at each policy-written token, times the token's weight.

    Logits are computed for a tile of TILE_ROWS tokens, and again in the backward pass, so that one tile of them is in
    memory at a time.

    Args:
        student: The policy.
        teachers: The teachers; each micro-batch must be of one domain (`pack_key`).
        divergence: From logits to divergences.
        observe: Called once for each tile with its domain, its divergences [N], and the share of the teacher's
            OVERLAP_TOKENS likeliest tokens that are among the student's.
    """

    def objective(forward: Forward) -> torch.Tensor:
        teacher_ND, teacher_VD = teachers.states(forward.pack)
        temperature_N1 = forward.pack.temperature_N[:, None]  # float32: it divides logits, not states
        observed: set[int] = set()  # starts of tiles, as each is computed again in the backward pass

        def tile_loss(states_MD: torch.Tensor, weight_VD: torch.Tensor, rows: slice) -> torch.Tensor:
            student_MV = _logits(states_MD, weight_VD) / temperature_N1[rows]
            with torch.no_grad():
                teacher_MV = _logits(teacher_ND[rows], teacher_VD) / temperature_N1[rows]
            divergence_M = divergence(student_MV, teacher_MV)
            if rows.start not in observed and not forward.is_filler:
                observed.add(rows.start)
                overlap = top_k_overlap(student_MV, teacher_MV, k=min(OVERLAP_TOKENS, student_MV.shape[1]))
                observe(forward.pack.samples[0].domain, divergence_M.detach(), overlap)
            return (divergence_M * forward.weights_N[rows]).sum()

        def all_tiles(states_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
            total = forward.weights_N.new_zeros(())
            for start in range(0, len(states_ND), TILE_ROWS):
                rows = slice(start, start + TILE_ROWS)
                total = total + checkpoint(tile_loss, states_ND[rows], weight_VD, rows, use_reentrant=False)
            return total

        return student.head(forward.states_ND, all_tiles)

    return objective


def _logits(states_MD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """The logits of an output head, [M, V], as `Head.forward` gives them."""
    logits_MV = linear(states_MD, weight_VD)
    return logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()


def _check_tokenizer(domain: str, folder: Path, student: Tokenizer) -> None:
    teacher = Tokenizer.load(folder)
    if teacher.fingerprint != student.fingerprint:
        raise CheckpointError(
            f"the teacher of {domain!r}, {folder}, has another vocabulary than the student: its token ids stand for "
            "other texts. Teachers must be trained from the student's checkpoint."
        )
    if teacher.chat_template != student.chat_template:
        raise CheckpointError(
            f"the teacher of {domain!r}, {folder}, has another chat template than the student, so it would score "
            "conversations of a format that it was not trained on. Use the student's template in both folders."
        )


TOP_K = 64


class Scorer(Protocol):
    """Scores samples by the policy; a `PolicyTrainer`, for example."""

    def logprobs(self, samples: list[Sample]) -> list[np.ndarray]:
        """See `PolicyTrainer`."""
        ...


class Distillation:
    """The teachers of a run, and their signal.

    Attributes:
        teachers: The teacher models by domain.
        objective: The objective that replaces the algorithm's token losses; None with signal "sampled".
        placement: Where the teachers are.
        score: Sets `teacher_logprobs` of samples, as `Teachers.score` does in one process.
    """

    def __init__(
        self,
        config: MopdConfig,
        student: MiMo,
        console: Console,
        *,
        placement: str = "resident",
        shard: Callable[[MiMo], None] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        """
        Args:
            config: The config of the run.
            student: The policy.
            console: Prints the distance from each teacher.
            placement: See `Teachers`, as for the arguments below.
            shard: See there.
            rank: See there.
            num_ranks: See there.

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
            placement=placement,
            shard=shard,
            rank=rank,
            num_ranks=num_ranks,
        )
        self.placement = placement
        self.score: Callable[[list[Sample]], None] = self.teachers.score
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

    def annotate(self, samples: list[Sample], trainer: Scorer, algorithm: Algorithm, options: Any) -> None:
        """Set advantages and weights of all samples; with signal "sampled", from the teachers' log-probabilities."""
        lowest = self._config.min_reward
        kept = [sample for sample in samples if is_learnable(sample) and (lowest is None or sample.reward >= lowest)]
        for sample in samples:
            sample.advantages, sample.weights = np.zeros(len(sample)), np.zeros(len(sample))
        if not kept:
            return
        if self._config.signal == "sampled":
            policy_logprobs = trainer.logprobs(kept)
            self.score(kept)
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

    def take_sums(self) -> dict[str, list[float]]:
        """The sums behind `metrics`, by name, each with its count; they start again from 0."""
        taken = {name: list(sums) for name, sums in self._sums.items()}
        self._sums.clear()
        return taken

    def add_sums(self, sums: Mapping[str, Sequence[float]]) -> None:
        """Add the sums of another process."""
        for name, (value, count) in sums.items():
            self._sums[name][0] += value
            self._sums[name][1] += count

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
