"""The training loss (paper sections 2.3 and 3.1) and validation.

The loss is the next-token cross-entropy plus the weighted mean cross-entropy of the MTP heads. Validation measures the
held-out loss by head and by position, and the acceptance rate of each MTP head's drafts.

T packed tokens, D model dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from openmimo.data.loader import Batch, Loader
from openmimo.kernels.operations import IGNORED_LABEL, kept_rows
from openmimo.model.context import PackedContext
from openmimo.model.heads import MicroBatch, micro_batch
from openmimo.model.mimo import MiMo


def training_loss(
    model: MiMo, batch: MicroBatch, context: PackedContext, *, label_counts: torch.Tensor, mtp_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of a micro-batch.

    Args:
        model: The model.
        batch: The tokens and labels.
        context: The context of the forward pass.
        label_counts: Labels per head in the whole optimizer step. Losses therefore add up over micro-batches.
        mtp_weight: Weight of the mean loss of the MTP heads.

    Returns:
        The loss, and each head's contribution to its mean cross-entropy in nats, float32 [heads].
    """
    return loss_of_states(
        model, model.head_states(batch, context), batch, label_counts=label_counts, mtp_weight=mtp_weight
    )


def loss_of_states(
    model: MiMo, states: list[torch.Tensor], batch: MicroBatch, *, label_counts: torch.Tensor, mtp_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of a micro-batch from the final states [T, D] of every head; see `training_loss`."""
    if model.head.joins(states[0]):
        return _joined_losses(model, states, batch, label_counts, mtp_weight)
    losses = [
        model.head.loss(states_TD, labels_T, _token_weights(labels_T, label_counts[head]), num_kept=num_kept)
        for head, (states_TD, labels_T, num_kept) in enumerate(_rows_of_heads(states, batch))
    ]
    total = losses[0]
    if len(losses) > 1:
        total = total + mtp_weight * torch.stack(losses[1:]).mean()
    return total, torch.stack([loss.detach() for loss in losses])


def _joined_losses(
    model: MiMo, states: list[torch.Tensor], batch: MicroBatch, label_counts: torch.Tensor, mtp_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `training_loss` with one call of the output head for the rows of all heads."""
    rows = [
        kept_rows(states_TD, labels_T, _token_weights(labels_T, label_counts[head]), num_kept)
        for head, (states_TD, labels_T, num_kept) in enumerate(_rows_of_heads(states, batch))
    ]
    mtp_share = mtp_weight / max(1, len(rows) - 1)
    hidden_TD, labels_T = (torch.cat([row[part] for row in rows]) for part in (0, 1))
    weights_T = torch.cat([weights * (mtp_share if head else 1.0) for head, (_, _, weights) in enumerate(rows)])
    total, logprobs_T = model.head.joined_loss(hidden_TD, labels_T, weights_T)
    parts = logprobs_T.split([len(labels) for _, labels, _ in rows])
    return total, torch.stack([-(weights * part).sum() for (_, _, weights), part in zip(rows, parts, strict=True)])


def _rows_of_heads(
    states: list[torch.Tensor], batch: MicroBatch
) -> Iterable[tuple[torch.Tensor, torch.Tensor, int | None]]:
    """Return states, labels and, if the host knows it, the number of labels of each head."""
    return zip(states, batch.labels, batch.num_labels or (None,) * len(batch.labels), strict=True)


def _token_weights(labels_T: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(labels_T, dtype=torch.float32) / count.clamp(min=1)


def load_micro_batches(
    loader: Loader, rows: int, *, micro_batch_size: int, num_mtp_heads: int, device: torch.device
) -> list[MicroBatch]:
    """Return the next `rows` rows of the loader in micro-batches of at most `micro_batch_size` rows."""
    sizes = [min(micro_batch_size, rows - done) for done in range(0, rows, micro_batch_size)]
    return [to_device(loader.next_batch(size), num_mtp_heads, device) for size in sizes]


def to_device(batch: Batch, num_mtp_heads: int, device: torch.device) -> MicroBatch:
    """Convert a batch of the loader to tensors with the labels of every head."""
    tokens_T = torch.from_numpy(batch.token_ids).to(torch.int64)
    mask_T = None if batch.loss_mask is None else torch.from_numpy(batch.loss_mask)
    return micro_batch(tokens_T, batch.document_lengths, mask_T, num_mtp_heads).to(device)


@dataclass(frozen=True)
class Evaluation:
    """Results of a validation.

    Attributes:
        losses: Mean cross-entropy of each head in nats.
        acceptance: For each MTP head, the share of positions at which its first choice equals that of the main head,
            given the true tokens in between.
        loss_by_position: Mean loss of the main head in buckets of position, whose widths double.
        position_edges: Upper ends of the buckets.
    """

    losses: list[float]
    acceptance: list[float]
    loss_by_position: list[float]
    position_edges: list[int]

    def metrics(self) -> dict:
        """Return the results under their names in `metrics.jsonl`."""
        return {
            "validation/main": self.losses[0],
            **{f"validation/mtp_{head}": loss for head, loss in enumerate(self.losses[1:])},
            **{f"validation/acceptance_{head}": share for head, share in enumerate(self.acceptance)},
            "validation/loss_by_position": self.loss_by_position,
            "validation/position_edges": self.position_edges,
        }


@torch.no_grad()
def evaluate(model: MiMo, batches: Iterable[Batch], sequence_length: int) -> Evaluation:
    """Evaluate the model on held-out batches with documents of at most `sequence_length` tokens."""
    model.eval()
    heads = model.config.num_mtp_heads
    loss_sums, counts = torch.zeros(1 + heads), torch.zeros(1 + heads)
    accepted, drafted = torch.zeros(heads), torch.zeros(heads)
    edges = _position_edges(sequence_length)
    position_sums, position_counts = torch.zeros(len(edges)), torch.zeros(len(edges))
    for batch in batches:
        micro = to_device(batch, heads, model.device)
        context = PackedContext(micro.document_lengths, device=model.device)
        states = model.head_states(micro, context)
        for head, (states_TD, labels_T) in enumerate(zip(states, micro.labels, strict=True)):
            losses_T = -model.head.logprobs(states_TD, labels_T).cpu()
            loss_sums[head] += losses_T.sum()
            counts[head] += (labels_T != IGNORED_LABEL).sum().cpu()
            if head == 0:
                _add_by_position(
                    losses_T, labels_T.cpu(), context.positions_T.cpu(), edges, position_sums, position_counts
                )
        agreed, valid = _agreement(model, states, micro)
        accepted += agreed
        drafted += valid
    return Evaluation(
        losses=(loss_sums / counts.clamp(min=1)).tolist(),
        acceptance=(accepted / drafted.clamp(min=1)).tolist(),
        loss_by_position=(position_sums / position_counts.clamp(min=1)).tolist(),
        position_edges=edges.tolist(),
    )


def _agreement(model: MiMo, states: list[torch.Tensor], batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two counts per MTP head: positions at which it agrees with the main head, and valid positions."""
    main_T = model.head.argmax(states[0])
    agreed, valid = [], []
    for head, states_TD in enumerate(states[1:]):
        draft_T = model.head.argmax(states_TD)
        # Head k drafts token i+2+k at position i; the main head predicts that token at position i+1+k.
        valid_T = batch.labels[1 + head] != IGNORED_LABEL
        target_T = torch.roll(main_T, -(1 + head))
        agreed.append(((draft_T == target_T) & valid_T).sum())
        valid.append(valid_T.sum())
    if not agreed:
        return torch.zeros(0), torch.zeros(0)
    return torch.stack(agreed).cpu(), torch.stack(valid).cpu()


def _position_edges(sequence_length: int) -> torch.Tensor:
    edges = [16]
    while edges[-1] < sequence_length:
        edges.append(edges[-1] * 2)
    return torch.tensor(edges)


def _add_by_position(
    losses_T: torch.Tensor,
    labels_T: torch.Tensor,
    positions_T: torch.Tensor,
    edges: torch.Tensor,
    sums: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    bucket_T = torch.bucketize(positions_T, edges, right=True)
    sums.index_add_(0, bucket_T, losses_T)
    counts.index_add_(0, bucket_T, (labels_T != IGNORED_LABEL).float())
