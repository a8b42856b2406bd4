"""Batches of the loader as micro-batches on the device."""

import torch

from openmimo.data.loader import Batch, Loader
from openmimo.train.loss import MicroBatch, micro_batch


def load_micro_batches(
    loader: Loader, rows: int, *, micro_batch_size: int, num_mtp_heads: int, device: torch.device
) -> list[MicroBatch]:
    """The next `rows` rows of the loader, in micro-batches of at most `micro_batch_size` rows."""
    sizes = [min(micro_batch_size, rows - done) for done in range(0, rows, micro_batch_size)]
    return [to_device(loader.next_batch(size), num_mtp_heads, device) for size in sizes]


def to_device(batch: Batch, num_mtp_heads: int, device: torch.device) -> MicroBatch:
    """A batch of the loader as tensors, with the labels of every head."""
    tokens_T = torch.from_numpy(batch.token_ids).to(torch.int64)
    mask_T = None if batch.loss_mask is None else torch.from_numpy(batch.loss_mask)
    built = micro_batch(tokens_T, batch.document_lengths, mask_T, num_mtp_heads)
    return MicroBatch(
        built.tokens_T.to(device), built.document_lengths, tuple(labels_T.to(device) for labels_T in built.labels)
    )
