"""The training loop of audio models: that of text models, with other batches, another loss, and rates per part."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from openmimo.model.audio.language import AudioLanguageModel
from openmimo.model.audio.sequence import AudioSequence
from openmimo.model.config import training_flops_per_token
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.train.audio.config import AudioPhase
from openmimo.train.audio.loader import AudioLoader
from openmimo.train.audio.loss import LossWeights, Targets, audio_loss, targets
from openmimo.train.checkpoint import load_optimizer_state
from openmimo.train.config import Phase
from openmimo.train.optim import build_optimizer, clip_gradients, rows_of_step, set_schedule
from openmimo.train.trainer import StepReport, Trainer

_ENCODER = ("input_local_transformer.", "speech_embeddings.", "speech_group_downcast.")
_DECODER = (
    "local_transformer.",
    "local_transformer_lm_heads.",
    "hidden_states_downcast.",
    "speech_embeddings_to_local.",
)


def part_of_name(name: str) -> str:
    """Return the part of a parameter: "encoder", "decoder" or "backbone"."""
    if name.startswith(_ENCODER):
        return "encoder"
    return "decoder" if name.startswith(_DECODER) else "backbone"


class AudioTrainer(Trainer):
    """Trains one run; see `Trainer`. Loaders are `AudioLoader`, phases are `AudioPhase`."""

    model: AudioLanguageModel
    loader: AudioLoader  # type: ignore[assignment]
    _audio_probe: AudioSequence | None = None
    _num_patches = (0, 0)  # encoded and predicted in the last step

    def train_step(self, stage: Phase, stage_step: int) -> StepReport:
        """As `Trainer.train_step`. The losses are those of the text channel and of the codebooks."""
        phase, rows = cast(AudioPhase, stage), rows_of_step(stage, stage_step)
        first_row = self.loader.rows_consumed
        size = self.config.micro_batch_size
        batches = [self.loader.next_batch(min(size, rows - done)) for done in range(0, rows, size)]
        losses, load, tokens = self._accumulate_audio(phase, batches)
        gradients = clip_gradients(self.model, self.config.optimizer.clip_norm, gradients=self.ranks.gradients)
        where = f"step {self.step + 1} (stage {stage.name!r}, rows {first_row} to {first_row + rows - 1} of its data)"
        set_schedule(self.optimizer, stage, stage_step, weight_decay=self.config.optimizer.weight_decay)
        self._scale_rates(phase)
        if self.guard.allows_step(losses, gradients, where):
            self.optimizer.step()
            for layer, router in self.model.routers().items():
                router.update_selection_bias(load[layer], stage.bias_rate)
            self._audio_probe = batches[0]
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += tokens
        return StepReport(losses, gradients, load, tokens)

    def _accumulate_audio(
        self, phase: AudioPhase, batches: list[AudioSequence]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], int]:
        weights = self._weights(phase)
        predicted = [targets(batch, weights) for batch in batches]
        counts = torch.stack([each.counts() for each in predicted]).sum(dim=0)
        tokens = sum(map(len, batches))
        encoded = sum(int(batch.is_patch_T.sum()) for batch in batches)
        self._num_patches = encoded, int(counts[1]) if any(weights.codebooks) else 0
        losses = torch.zeros(1 + self.model.audio.num_codebooks, device=self.device)
        load: dict[int, torch.Tensor] = {}
        for batch, each in zip(batches, predicted, strict=True):
            context = PackedContext(
                batch.document_lengths,
                device=self.device,
                routing=RoutingTape(record=True),
                balance_weight=self.config.balance_weight * len(batch) / tokens,
            )
            loss, shares = audio_loss(self.model, batch.to(self.device), each, context, weights, counts)
            loss.backward()
            losses += shares
            if self.model.config.moe is not None:
                context.routing.add_expert_load(load, self.model.config.moe.num_experts)
        return losses, load, tokens

    def _weights(self, phase: AudioPhase) -> LossWeights:
        return LossWeights(phase.text_weight, phase.codebook_weights, phase.empty_weight)

    def _new_optimizer(self, tensors: Mapping[str, Any]) -> torch.optim.AdamW:
        parts = {parameter: part_of_name(name) for name, parameter in self.model.named_parameters()}
        optimizer = build_optimizer(
            self.model, self.config.optimizer, mesh_of=lambda parameter: _part(parts, parameter)
        )
        for group in optimizer.param_groups:
            group["part"] = parts[group["params"][0]]
        load_optimizer_state(self.model, optimizer, tensors, like=self.ranks.like)
        return optimizer

    def _scale_rates(self, phase: AudioPhase) -> None:
        """Set the learning rates of encoder and decoder, in proportion to their peaks."""
        peaks = {"encoder": phase.encoder_learning_rate, "decoder": phase.decoder_learning_rate}
        for group in self.optimizer.param_groups:
            peak = peaks.get(group["part"])
            if peak is not None:
                group["lr"] *= peak / phase.learning_rate

    def _check_weights(self) -> None:
        self.guard.check_weights(f"the model after step {self.step}")
        if self._audio_probe is not None:
            loss, _ = self._loss_of(self._audio_probe)
            self.guard.check_step(loss, f"the model after step {self.step}, on a micro-batch of that step,")

    def _loss_of(self, batch: AudioSequence, predicted: Targets | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of one batch alone, with the weights of the phase."""
        weights = self._weights(cast(AudioPhase, self.config.stages[self._stage_index]))
        predicted = predicted or targets(batch, weights)
        context = PackedContext(batch.document_lengths, device=self.device)
        return audio_loss(self.model, batch.to(self.device), predicted, context, weights, predicted.counts())

    def _evaluate(self) -> None:
        batches = self.loader.held_out_batches(self.config.micro_batch_size, self.config.evaluation.batches)
        losses = self._held_out_losses(batches)
        if losses is None:
            return
        stage = self.config.stages[self._stage_index]
        values = {f"validation/codebook_{number}": loss for number, loss in enumerate(losses[1:])}
        self._write({"stage": stage.name, "validation/main": losses[0], **values})
        self.guard.check_loss(torch.tensor(losses), f"the held-out loss after step {self.step}")

    @torch.no_grad()
    def _held_out_losses(self, batches: Iterable[AudioSequence]) -> list[float] | None:
        """Return the mean losses of the text channel and the codebooks; None without held-out rows."""
        weights = LossWeights(1.0, (1.0,) * self.model.audio.num_codebooks, 0.0)
        sums, counts = torch.zeros(1 + len(weights.codebooks)), torch.zeros(2)
        self.model.eval()
        for batch in batches:
            predicted = targets(batch, weights)
            context = PackedContext(batch.document_lengths, device=self.device)
            _, shares = audio_loss(self.model, batch.to(self.device), predicted, context, weights, torch.ones(2))
            sums += shares.cpu()
            counts += predicted.counts()
        self.model.train()
        if not counts.sum():
            return None
        text, patches = counts.clamp(min=1).tolist()
        return [float(sums[0]) / text, *(float(total) / patches for total in sums[1:])]

    def _step_metrics(self, stage: Phase, report: StepReport, seconds: float) -> dict[str, Any]:
        values = super()._step_metrics(stage, report, seconds)
        values["flops"] += self._local_flops()
        values["matmul_utilization"] = values["flops"] / seconds / self._matmul_flops
        return {name.replace("loss/mtp_", "loss/codebook_"): value for name, value in values.items()}

    def _local_flops(self) -> float:
        """Count the FLOPs of the local transformers in the last step, without the heads of the codebooks."""
        audio, (encoded, predicted) = self.model.audio, self._num_patches
        encoder, decoder = (audio.local_model(local) for local in (audio.encoder, audio.decoder))
        per_patch = audio.patch_frames * training_flops_per_token(encoder, audio.patch_frames)
        per_prediction = audio.local_steps * training_flops_per_token(decoder, audio.local_steps)
        return encoded * per_patch + predicted * per_prediction


def _part(parts: dict[nn.Parameter, str], parameter: torch.Tensor) -> str:
    assert isinstance(parameter, nn.Parameter)
    return parts[parameter]
