"""Teachers: for each domain a model of the same vocabulary, which scores what the student wrote (paper section 4.4).

A teacher only reads: one forward pass over finished samples. Domains that name the same checkpoint share one model. The
teacher "self" is the checkpoint that the student started from: it holds a domain that has no expert where it is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.samples import Sample
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import load_model
from openmimo.model.mimo import MiMo
from openmimo.rl.learning.packing import PackedSamples
from openmimo.rl.learning.policy_trainer import Forward, Objective, score_samples
from openmimo.rl.losses import distillation
from openmimo.rl.losses.diagnostics import top_k_overlap

SELF = "self"
TILE_ROWS = 512
OVERLAP_TOKENS = 8
FOREIGN_KL = 1.5  # nats a token; children of one checkpoint were seen at 0.3 to 0.9 (docs/rl.md)


class Teachers:
    """The teachers of a run, by domain.

    Raises ConfigError for a domain without a teacher or a teacher without a domain, and CheckpointError for a teacher
    of another vocabulary or chat template: its numbers would be about other texts.
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        *,
        domains: list[str],
        student: Path,
        device: torch.device,
        tokens_per_microbatch: int = 8192,
    ):
        missing, unused = sorted(set(domains) - set(paths)), sorted(set(paths) - set(domains))
        if missing or unused:
            raise ConfigError(
                f"teachers: domains without a teacher: {', '.join(missing) or 'none'}; teachers of no domain: "
                f"{', '.join(unused) or 'none'}. Name a checkpoint folder for each domain, or {SELF!r} for the "
                "checkpoint that the student starts from."
            )
        self._tokens_per_microbatch = tokens_per_microbatch
        self._folders = {domain: student if path == SELF else Path(path) for domain, path in paths.items()}
        ours = Tokenizer.load(student)
        self._models: dict[Path, MiMo] = {}
        for domain, folder in self._folders.items():
            _check_tokenizer(domain, folder, ours)
            if folder.resolve() not in self._models:
                model = load_model(folder, dtype="float32", device=str(device)).requires_grad_(False)
                self._models[folder.resolve()] = model

    def model(self, domain: str) -> MiMo:
        """The teacher of a domain."""
        return self._models[self._folders[domain].resolve()]

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Teachers compute in the student's dtype, so that a self-teacher gives the student's own numbers."""
        for model in self._models.values():
            model.compute_dtype = dtype

    def score(self, samples: list[Sample]) -> None:
        """Fills `teacher_logprobs`: the log-probability of every written token, at the sample's temperature.

        Teachers route by themselves: the routes that the student took are its own.
        """
        for domain in dict.fromkeys(sample.domain for sample in samples):
            own = [sample for sample in samples if sample.domain == domain]
            scores = score_samples(
                self.model(domain), own, tokens_per_microbatch=self._tokens_per_microbatch, replay=False
            )
            for sample, logprobs in zip(own, scores, strict=True):
                sample.teacher_logprobs = logprobs

    @torch.no_grad()
    def states(self, pack: PackedSamples) -> tuple[torch.Tensor, MiMo]:
        """States [N, D] of the teacher where the pack's written tokens are predicted, and the teacher."""
        model = self.model(pack.samples[0].domain)
        hidden = model(pack.tokens_T, pack.context())
        return hidden.post_norm_TD[pack.rows_N], model


Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Watch = Callable[[str, torch.Tensor, float], None]


def divergence_named(signal: str, top_k: int) -> Divergence:
    """Full-vocabulary `reverse_kl` or `forward_kl`, or the corrected reverse KL over the teacher's `top_k`."""
    if signal == "top_k":

        def of_top_k(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
            return distillation.top_k_reverse_kl(student_NV, *distillation.teacher_top_k(teacher_NV, top_k))

        return of_top_k
    return {"full": distillation.reverse_kl, "forward": distillation.forward_kl}[signal]


def distillation_objective(student: MiMo, teachers: Teachers, divergence: Divergence, *, watch: Watch) -> Objective:
    """The divergence from the domain's teacher at every written token, weighted as the samples say.

    Micro-batches must hold one domain each (`pack_key`). Logits are made a few hundred tokens at a time, and again in
    the backward pass, so that only one such tile is ever held. watch: is told of each tile its domain, its divergences
    [N] and the share of the teacher's likeliest tokens that are among the student's.
    """

    def objective(forward: Forward) -> torch.Tensor:
        teacher_ND, teacher = teachers.states(forward.pack)
        temperature_N1 = forward.pack.temperature_N[:, None]  # float32: it divides logits, not states
        watched: set[int] = set()  # tiles, which are computed again in the backward pass

        def tile_loss(states_MD: torch.Tensor, rows: slice) -> torch.Tensor:
            student_MV = student.head(states_MD) / temperature_N1[rows]
            with torch.no_grad():
                teacher_MV = teacher.head(teacher_ND[rows]) / temperature_N1[rows]
            divergence_M = divergence(student_MV, teacher_MV)
            if rows.start not in watched:
                watched.add(rows.start)
                overlap = top_k_overlap(student_MV, teacher_MV, k=min(OVERLAP_TOKENS, student_MV.shape[1]))
                watch(forward.pack.samples[0].domain, divergence_M.detach(), overlap)
            return (divergence_M * forward.weights_N[rows]).sum()

        total = forward.states_ND.new_zeros(())
        for start in range(0, len(forward.states_ND), TILE_ROWS):
            rows = slice(start, start + TILE_ROWS)
            total = total + checkpoint(tile_loss, forward.states_ND[rows], rows, use_reentrant=False)
        return total

    return objective


def _check_tokenizer(domain: str, folder: Path, ours: Tokenizer) -> None:
    theirs = Tokenizer.load(folder)
    if theirs.fingerprint != ours.fingerprint:
        raise CheckpointError(
            f"the teacher of {domain!r}, {folder}, has another vocabulary than the student: its token ids mean other "
            "texts. Teachers must be children of the student's own checkpoint."
        )
    if theirs.chat_template != ours.chat_template:
        raise CheckpointError(
            f"the teacher of {domain!r}, {folder}, has another chat template than the student, so it would score "
            "conversations that it never saw. Use the student's template in both folders."
        )
