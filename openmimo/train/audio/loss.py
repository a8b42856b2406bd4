"""The loss of an audio model: the text channel, and each codebook of the patches (arXiv 2512.23808, section 3.3).

T positions, P patches, H frames of a patch, Q codebooks, D model dim.
"""

from dataclasses import dataclass
from typing import cast

import torch

from openmimo.kernels.operations import IGNORED_LABEL
from openmimo.model.audio.language import AudioLanguageModel
from openmimo.model.audio.sequence import AudioSequence
from openmimo.model.context import PackedContext
from openmimo.model.heads import Head, shift_within_documents


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss. The sum of the weighted means is divided by the sum of the weights.

    Attributes:
        text: Weight of the text channel.
        codebooks: Weight of each codebook.
        empty: Weight of a patch in the mean of the text channel, where a text token has 1.
    """

    text: float
    codebooks: tuple[float, ...]
    empty: float


@dataclass(frozen=True)
class Targets:
    """What a batch predicts.

    Attributes:
        labels_T: The text id after each position, `IGNORED_LABEL` where none is predicted.
        weights_T: Weight of each label in the mean of the text channel, float32.
        patches_P: Positions of the predicted patches, int64.
    """

    labels_T: torch.Tensor
    weights_T: torch.Tensor
    patches_P: torch.Tensor

    def counts(self) -> torch.Tensor:
        """Return the sum of the text weights and the number of predicted patches, float32 [2]."""
        return torch.stack([self.weights_T.sum(), torch.tensor(float(len(self.patches_P)))])


def targets(batch: AudioSequence, weights: LossWeights) -> Targets:
    """Return the targets of a batch. The first position of a document is never predicted."""
    is_first_T = torch.zeros(len(batch), dtype=torch.bool)
    lengths = torch.tensor(batch.document_lengths)
    is_first_T[lengths.cumsum(0) - lengths] = True
    label_ids_T = torch.where(batch.has_loss_T, batch.text_ids_T, IGNORED_LABEL)
    labels_T = shift_within_documents(label_ids_T, batch.document_lengths, by=1, fill=IGNORED_LABEL)
    is_patch_T = shift_within_documents(batch.is_patch_T.long(), batch.document_lengths, by=1, fill=0).bool()
    weights_T = torch.where(is_patch_T, weights.empty, 1.0) * (labels_T != IGNORED_LABEL)
    labels_T = torch.where(weights_T > 0, labels_T, IGNORED_LABEL)
    patches_P = (batch.is_patch_T & batch.has_loss_T & ~is_first_T).nonzero()[:, 0]
    return Targets(labels_T, weights_T, patches_P)


def audio_loss(
    model: AudioLanguageModel,
    batch: AudioSequence,
    predicted: Targets,
    context: PackedContext,
    weights: LossWeights,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of a micro-batch.

    Args:
        model: The model.
        batch: The micro-batch, on the model's device.
        predicted: Its targets.
        context: The context of the pass.
        weights: Weights of the loss.
        counts: `Targets.counts` of the whole optimizer step. Losses therefore add up over micro-batches.

    Returns:
        The loss, and the contributions to the mean loss in nats of the text channel and of each codebook, [1 + Q].
    """
    device = batch.text_ids_T.device
    text_total, num_patches = counts.clamp(min=1e-8).tolist()
    states_TD = model.states(batch, context).post_norm_TD
    text = model.head.loss(states_TD, predicted.labels_T.to(device), (predicted.weights_T / text_total).to(device))
    losses = [text] + [text.new_zeros(())] * len(weights.codebooks)
    if any(weights.codebooks) and len(predicted.patches_P):
        patches_P = predicted.patches_P.to(device)
        codes_PHQ = batch.codes_THQ[patches_P]
        states_PHL = model.local_states(states_TD[patches_P - 1], codes_PHQ)
        for number, states in enumerate(states_PHL):
            labels_N = codes_PHQ[:, :, number].flatten()
            share_N = torch.full(labels_N.shape, 1.0 / (num_patches * codes_PHQ.shape[1]), device=device)
            head = cast(Head, model.local_transformer_lm_heads[number])
            losses[1 + number] = head.loss(states.flatten(0, 1), labels_N, share_N)
    each = (weights.text, *weights.codebooks)
    total = torch.stack([weight * loss for weight, loss in zip(each, losses, strict=True)]).sum() / sum(each)
    return total, torch.stack([loss.detach() for loss in losses])
