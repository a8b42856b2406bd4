"""The training loop of an audio tokenizer, in the two stages of MiMo-Audio.

Each step draws its random numbers from a generator that its number seeds, so a resumed run needs no state of generators
and computes the same steps as an uninterrupted one.

B segments, S samples, F code frames, D dim, Q codebooks.
"""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch import nn

from openmimo.core.errors import CheckpointError, Interrupted, StopRequest, stop_requests
from openmimo.core.metrics import MetricsWriter, TimeLeft
from openmimo.model.audio.quantizer import perplexity
from openmimo.model.audio.tokenizer import AudioTokenizer
from openmimo.runtime.device import peak_memory_bytes, synchronize
from openmimo.train.audio.tokenizer.clips import Clip, Segments, fixed_segments, random_segments
from openmimo.train.audio.tokenizer.config import AudioTokenizerTrainConfig, TokenizerPhase
from openmimo.train.audio.tokenizer.discriminators import Discriminators
from openmimo.train.audio.tokenizer.losses import (
    MultiScaleMel,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from openmimo.train.audio.tokenizer.start import set_initial_values
from openmimo.train.audio.tokenizer.state import load_state, write_state
from openmimo.train.audio.tokenizer.text import TextModel
from openmimo.train.checkpoint import Checkpoints, Progress
from openmimo.train.optim import GradientReport, StepGuard, parameter_groups, warmed_cosine

Losses = dict[str, torch.Tensor]
_SEED_STRIDE = 1_000_003
_SILENCE = 1e-5  # magnitudes below which the mel distance sees no differences, if the tokenizer's floor is lower
_START_SEGMENTS = 32  # of which the initial values are computed


class Trained(nn.Module):
    """All modules that a run trains.

    Args:
        config: The run.
        tokenizer: The tokenizer.
    """

    def __init__(self, config: AudioTokenizerTrainConfig, tokenizer: AudioTokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        generator = torch.Generator().manual_seed(config.seed)
        self.text = TextModel(config.text_model, tokenizer.config.encoder.dim, generator)
        self.discriminators = Discriminators(config.discriminators)


class Decoded(NamedTuple):
    """One pass through the tokenizer in training.

    Attributes:
        waveform_BS: The decoded waveform.
        losses: Losses of this pass by name.
        states_TD: The encoder's states.
        ids_TQ: Their codes (None: the codebooks do not exist yet).
    """

    waveform_BS: torch.Tensor
    losses: Losses
    states_TD: torch.Tensor
    ids_TQ: torch.Tensor | None


class Trainer:
    """Trains a tokenizer from a given step on.

    Args:
        config: The run.
        tokenizer: The tokenizer, on the device of the run.
        clips: Training clips.
        held_out: Clips for evaluation.
        checkpoint: The folder of the checkpoint to continue from (None: a new run).
        console: Console for the progress bar and warnings.
    """

    def __init__(
        self,
        config: AudioTokenizerTrainConfig,
        tokenizer: AudioTokenizer,
        clips: Sequence[Clip],
        held_out: Sequence[Clip],
        *,
        checkpoint: Path | None,
        console: Console,
    ):
        self.config, self.console = config, console
        self.clips, self.held_out = clips, held_out
        self.device = tokenizer.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.modules = Trained(config, tokenizer).to(self.device)
        self.tokenizer = tokenizer
        for codebook in tokenizer.encoder.quantizer.books:
            codebook.decay = config.quantizer.decay
        self.mel_distance = MultiScaleMel(
            tokenizer.config.sample_rate, config.mel_scales, max(tokenizer.config.mel_floor, _SILENCE)
        ).to(self.device)
        self.optimizer = _adamw(config, {"tokenizer": tokenizer, "text": self.modules.text})
        self.adversary = torch.optim.AdamW(
            self.modules.discriminators.parameters(), betas=(0.8, 0.99), weight_decay=0.0
        )  # fmt: skip
        self.step = 0
        if checkpoint is not None:
            self.step = load_state(checkpoint, self.modules, [self.optimizer, self.adversary])
        self.checkpoints = Checkpoints(Path(config.run_folder), config.checkpoints)
        self.metrics = MetricsWriter(Path(config.run_folder), tensorboard=config.tensorboard)
        self.metrics.truncate_after(self.step or -1)
        self.guard = StepGuard(self.modules, max_skipped_steps=config.optimizer.max_skipped_steps)

    def run(self, *, stop_after_step: int | None = None) -> None:
        """Train to the end or to `stop_after_step`. Writes metrics and checkpoints regularly and at the end.

        Raises:
            DivergedError: Losses, gradients or weights are not finite.
            Interrupted: SIGINT or SIGTERM was received. The current step was completed and its checkpoint written.
        """
        last = self.config.total_steps if stop_after_step is None else stop_after_step
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        time_left = TimeLeft()
        with self.checkpoints.named_in_errors(), stop_requests() as stop:
            with ProgressBar(*columns, console=self.console) as bar:
                task = bar.add_task("training", total=last, completed=self.step)
                while self.step < last and stop.signal is None:
                    started = time.perf_counter()
                    phase, values = self._next_step()
                    synchronize(self.device)
                    seconds = time.perf_counter() - started
                    self._after_step(phase, values, seconds, is_last=self.step == last)
                    if said := time_left.after_step(seconds, phase.batch_size, self._segments_left(last)):
                        self.console.print(said)
                    bar.update(task, completed=self.step, description=f"{phase.name} mel {values['loss/mel']:.3f}")
            self._end(stop)
        self.metrics.close()

    def _end(self, stop: StopRequest) -> None:
        if stop.signal is not None:
            saved = self.checkpoints.save_before_end(self.step, self.save)
            raise Interrupted(stop.signal or signal.SIGTERM, saved)

    def _segments_left(self, last: int) -> float:
        stages, first = self.config.stages, 0
        left = 0
        for stage in stages:
            left += max(0, min(last, first + stage.steps) - max(self.step, first)) * stage.batch_size
            first += stage.steps
        return left

    def save(self) -> Path:
        """Write a checkpoint. Raises CheckpointError, and DivergedError if weights are not finite."""
        self.guard.check_weights(f"the tokenizer after step {self.step}")
        self.metrics.sync()
        progress = Progress(step=self.step, tokens=0, stage_index=0, loader={})
        return self.checkpoints.write(
            self.step, lambda folder: write_state(folder, self.modules, [self.optimizer, self.adversary], progress)
        )

    # --- steps -------------------------------------------------------------------------------------------------------

    def _next_step(self) -> tuple[TokenizerPhase, dict[str, float]]:
        phase, phase_step = self.config.place_of(self.step)
        seed = self.config.seed * _SEED_STRIDE + self.step
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
            torch.manual_seed(seed)
            if self.step == 0 and self.config.init_from is None:
                start = random_segments(self.clips, _START_SEGMENTS, self.samples_of(phase), generator)
                set_initial_values(self.tokenizer, start.waveform_BS.to(self.device))
            if self._starts_codebooks(phase_step):
                self._start_codebooks(phase, generator)
            batch = random_segments(self.clips, phase.batch_size, self.samples_of(phase), generator)
            self._set_rates(phase, phase_step)
            train = self._reconstruction_step if phase.kind == "reconstruction" else self._adversarial_step
            values = train(phase, batch, generator)
        self.step += 1
        return phase, values

    def samples_of(self, phase: TokenizerPhase) -> int:
        """Return the length of a segment of this stage: a whole number of code frames."""
        config = self.tokenizer.config
        return max(1, round(phase.segment_seconds * config.frames_per_second)) * config.samples_per_frame

    def _starts_codebooks(self, phase_step: int) -> bool:
        return not self._has_codebooks() and phase_step >= self.config.quantizer.start_step

    def _has_codebooks(self) -> bool:
        return bool(self.tokenizer.encoder.quantizer.books[0].inited)

    @torch.no_grad()
    def _start_codebooks(self, phase: TokenizerPhase, generator: torch.Generator) -> None:
        """Initialize the codebooks from the states of some batches."""
        settings, states = self.config.quantizer, []
        for _ in range(settings.start_batches):
            batch = random_segments(self.clips, phase.batch_size, self.samples_of(phase), generator)
            states.append(self.tokenizer.encoder(self._mel(batch.waveform_BS.to(self.device))).flatten(0, 1))
        self.tokenizer.encoder.quantizer.initialize(torch.cat(states), settings.iterations)

    def _mel(self, waveform_BS: torch.Tensor) -> torch.Tensor:
        """Return the mel spectrogram of segments without its last frame, so that it has whole code frames."""
        return self.tokenizer.log_mel(waveform_BS)[:, :-1]

    def _reconstruction_step(
        self, phase: TokenizerPhase, batch: Segments, generator: torch.Generator
    ) -> dict[str, float]:  # fmt: skip
        """Train encoder, codebooks, decoder and text model."""
        self.modules.train()
        waveform_BS, weights = batch.waveform_BS.to(self.device), phase.weights
        decoded = self._decode(waveform_BS, batch.texts, phase, generator)
        loss = sum(
            (getattr(weights, name) * value for name, value in decoded.losses.items()),
            torch.zeros((), device=self.device),
        )
        loss.backward()
        is_taken = self._step_optimizer(loss, self.optimizer)
        if is_taken and decoded.ids_TQ is not None:
            self.tokenizer.encoder.quantizer.update(decoded.states_TD, decoded.ids_TQ)
        return _as_metrics(decoded.losses)

    def _decode(
        self, waveform_BS: torch.Tensor, texts: list[str | None], phase: TokenizerPhase, generator: torch.Generator
    ) -> Decoded:
        """Encode and decode segments, with the losses of the first stage that have a weight."""
        tokenizer, losses = self.tokenizer, Losses()
        mel_BLM = self._mel(waveform_BS)
        states_BFD = tokenizer.encoder(mel_BLM)
        states_TD, ids_TQ = states_BFD.flatten(0, 1), None
        codes_BFD = states_BFD
        if self._has_codebooks():
            counts_T = self._codebook_counts(states_BFD, generator)
            quantized = tokenizer.encoder.quantizer(states_TD, counts_T)
            codes_BFD, ids_TQ = quantized.output_TD.view_as(states_BFD), quantized.ids_TQ
            losses["commitment"] = quantized.commitment
        coarse_BLM = tokenizer.decoder.coarse_mel(codes_BFD)
        decoded_BS = tokenizer.decoder.vocoder(coarse_BLM)
        losses["mel"] = self.mel_distance(decoded_BS, waveform_BS)
        if phase.weights.coarse_mel:
            losses["coarse_mel"] = F.l1_loss(coarse_BLM, mel_BLM)
        if phase.weights.text:
            text_loss = self.modules.text(codes_BFD, texts)
            losses |= {} if text_loss is None else {"text": text_loss}
        return Decoded(decoded_BS, losses, states_TD, ids_TQ)

    def _codebook_counts(self, states_BFD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the number of codebooks of each frame: random for some segments, all for the others."""
        (segments, frames), books = states_BFD.shape[:2], self.tokenizer.config.num_codebooks
        random_B = torch.randint(1, books + 1, (segments,), generator=generator)
        is_partial_B = torch.rand(segments, generator=generator) < self.config.quantizer.partial
        return random_B.where(is_partial_B, books).repeat_interleave(frames).to(self.device)

    def _adversarial_step(
        self, phase: TokenizerPhase, batch: Segments, generator: torch.Generator
    ) -> dict[str, float]:  # fmt: skip
        """Train the discriminators on real and decoded segments, then the decoder against them."""
        self.modules.train()
        tokenizer, weights, discriminators = self.tokenizer, phase.weights, self.modules.discriminators
        waveform_BS = batch.waveform_BS.to(self.device)
        with torch.no_grad():
            states_BFD = tokenizer.encoder(self._mel(waveform_BS))
            counts_T = self._codebook_counts(states_BFD, generator)
            codes_BFD = tokenizer.encoder.quantizer(states_BFD.flatten(0, 1), counts_T).output_TD.view_as(states_BFD)
        coarse_BLM = tokenizer.decoder.coarse_mel(codes_BFD)
        decoded_BS = tokenizer.decoder.vocoder(coarse_BLM)

        losses, reported = {"mel": self.mel_distance(decoded_BS, waveform_BS)}, {}
        if weights.adversarial or weights.feature_matching:
            against = discriminator_loss(discriminators(waveform_BS), discriminators(decoded_BS.detach()))
            against.backward()
            self._step_optimizer(against, self.adversary)
            reported["discriminators"] = against
            with torch.no_grad():
                real = discriminators(waveform_BS)
            judged = discriminators(decoded_BS)
            losses |= {"adversarial": adversarial_loss(judged), "feature_matching": feature_loss(real, judged)}
        if weights.coarse_mel:
            losses["coarse_mel"] = F.l1_loss(coarse_BLM, self._mel(waveform_BS))
        loss = torch.stack([getattr(weights, name) * value for name, value in losses.items()]).sum()
        loss.backward()
        self._step_optimizer(loss, self.optimizer)
        return _as_metrics(losses | reported)

    def _set_rates(self, phase: TokenizerPhase, phase_step: int) -> None:
        rate = warmed_cosine(
            phase_step,
            steps=phase.steps,
            peak=phase.learning_rate,
            end=phase.end_learning_rate,
            warmup_steps=phase.warmup_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for group in self.adversary.param_groups:
            group["lr"] = phase.discriminator_learning_rate * rate / phase.learning_rate

    def _step_optimizer(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Clip the gradients of an optimizer's parameters, take its step unless the guard skips it, drop all gradients.

        Returns:
            Whether the step was taken.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.optimizer.clip_norm)
        zero = torch.zeros((), device=self.device)
        is_taken = self.guard.allows_step(loss, GradientReport(norm, zero.long(), zero), f"step {self.step + 1}")
        if is_taken:
            optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.adversary.zero_grad(set_to_none=True)
        return is_taken

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _after_step(self, phase: TokenizerPhase, values: dict[str, float], seconds: float, *, is_last: bool) -> None:
        if self.step % self.config.log_every_steps == 0 or is_last:
            audio_seconds = phase.batch_size * self.samples_of(phase) / self.tokenizer.config.sample_rate
            self.metrics.write(
                self.step,
                {
                    "stage": phase.name,
                    **values,
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "audio_seconds_per_second": audio_seconds / seconds,
                    "skipped_steps": self.guard.num_skipped,
                    "memory_bytes": peak_memory_bytes(self.device),
                },
            )
        if self._has_codebooks() and (self.step % self.config.evaluate_every_steps == 0 or is_last):
            self.metrics.write(self.step, {"stage": phase.name, **self.evaluate(phase)})
        if is_last:
            self.save()
        elif self.step % self.config.checkpoints.every_steps == 0:
            try:
                self.save()
            except CheckpointError as error:
                self.console.print(f"[yellow]warning:[/] {error} Training continues.", soft_wrap=True)

    @torch.no_grad()
    def evaluate(self, phase: TokenizerPhase) -> dict[str, Any]:
        """Return mel distances by codebooks, codebook perplexities and the text loss, of held-out segments."""
        self.modules.eval()
        tokenizer = self.tokenizer
        samples = self.samples_of(self.config.stages[0])  # the same segments in all stages
        segments = fixed_segments(self.held_out, self.config.evaluation_clips, samples)
        waveform_BS = segments.waveform_BS.to(self.device)
        states_BFD = tokenizer.encoder(self._mel(waveform_BS))
        ids_TQ = tokenizer.encoder.quantizer.encode(states_BFD.flatten(0, 1))
        distances = []
        for count in range(1, tokenizer.config.num_codebooks + 1):
            codes_BFD = tokenizer.encoder.quantizer.decode(ids_TQ[:, :count]).view_as(states_BFD)
            distances.append(float(self.mel_distance(tokenizer.decoder(codes_BFD), waveform_BS)))
        sizes = tokenizer.config.codebook_sizes
        values: dict[str, Any] = {
            "validation/mel": distances[-1],
            "validation/mel_by_codebooks": distances,
            "validation/perplexity": [perplexity(ids_TQ[:, index], size) for index, size in enumerate(sizes)],
        }
        if phase.kind == "reconstruction" and phase.weights.text:
            all_BFD = tokenizer.encoder.quantizer.decode(ids_TQ).view_as(states_BFD)
            text_loss = self.modules.text(all_BFD, segments.texts)
            values |= {} if text_loss is None else {"validation/text": float(text_loss)}
        return values


def _as_metrics(losses: Losses) -> dict[str, float]:
    return {f"loss/{name}": float(value.detach()) for name, value in losses.items()}


def _adamw(config: AudioTokenizerTrainConfig, modules: dict[str, nn.Module]) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    decayed, free = [], []
    for module in modules.values():
        with_decay, without_decay = parameter_groups(module)
        decayed += list(with_decay.values())
        free += list(without_decay.values())
    settings = config.optimizer
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)
