"""The training loss: next token, plus the weighted mean of the MTP heads (paper sections 2.3 and 3.1).

T packed tokens, D model dim.
"""

from dataclasses import dataclass

import torch

from openmimo.kernels.token_loss import IGNORED_LABEL
from openmimo.model.context import PackedContext
from openmimo.model.mimo import MiMo
from openmimo.model.mtp import shift_within_documents


@dataclass(frozen=True)
class MicroBatch:
    """Packed tokens on the device, and what each head has to predict at each place (-1: nothing).

    labels: int64 [T] per head, the main head first, then the MTP heads.
    """

    tokens_T: torch.Tensor
    document_lengths: tuple[int, ...]
    labels: tuple[torch.Tensor, ...]

    def label_counts(self) -> torch.Tensor:
        """Number of labels of each head, int64 [heads]."""
        return torch.stack([(labels_T != IGNORED_LABEL).sum() for labels_T in self.labels])


def micro_batch(
    tokens_T: torch.Tensor, document_lengths: tuple[int, ...], loss_mask_T: torch.Tensor | None, num_mtp_heads: int
) -> MicroBatch:
    """Labels from packed tokens: head k (0: the main one) predicts the token k+1 places on, in the same document.

    loss_mask_T, bool [T]: which tokens count as labels (None: all).
    """
    label_tokens_T = tokens_T if loss_mask_T is None else torch.where(loss_mask_T, tokens_T, IGNORED_LABEL)
    labels = tuple(
        shift_within_documents(label_tokens_T, document_lengths, by=1 + head, fill=IGNORED_LABEL)
        for head in range(1 + num_mtp_heads)
    )
    return MicroBatch(tokens_T, document_lengths, labels)


def training_loss(
    model: MiMo, batch: MicroBatch, context: PackedContext, *, label_counts: torch.Tensor, mtp_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a micro-batch, and each head's share of its mean cross-entropy, in nats, float32 [heads].

    `label_counts` are those of the whole optimizer step, so that shares add up over micro-batches to means over tokens.
    """
    states = head_states(model, batch, context)
    losses = [
        _head_loss(model, states_TD, labels_T, label_counts[head])
        for head, (states_TD, labels_T) in enumerate(zip(states, batch.labels, strict=True))
    ]
    total = losses[0]
    if len(losses) > 1:
        total = total + mtp_weight * torch.stack(losses[1:]).mean()
    return total, torch.stack([loss.detach() for loss in losses])


def head_states(model: MiMo, batch: MicroBatch, context: PackedContext) -> list[torch.Tensor]:
    """States [T, D] of every head from one pass, the main one first, each ready for the output head."""
    hidden = model(batch.tokens_T, context, shifted_tokens(batch))
    return [hidden.post_norm_TD, *hidden.mtp_TD.values()]


def shifted_tokens(batch: MicroBatch) -> dict[int, torch.Tensor]:
    """By MTP head, the tokens that it reads, int64 [T]; see `MiMo.forward`."""
    return {
        head: shift_within_documents(batch.tokens_T, batch.document_lengths, by=1 + head, fill=0)
        for head in range(len(batch.labels) - 1)
    }


def _head_loss(model: MiMo, states_TD: torch.Tensor, labels_T: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    weights_T = torch.ones_like(labels_T, dtype=torch.float32) / count.clamp(min=1)
    return model.head.loss(states_TD, labels_T, weights_T)
