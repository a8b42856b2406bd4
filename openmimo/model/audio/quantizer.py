"""Residual vector quantization (arXiv 2107.03312) with codebooks that are moving averages of their members.

Each codebook quantizes what the codebooks before it left over. Codebooks have no gradient: an entry moves to the mean
of the vectors that chose it. That alone collapses to a few used entries, so the entries start as the centers of k-means
clusters, and an entry that training no longer uses is replaced by a random vector of the batch.

T vectors, D dim, E entries, Q codebooks.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

_SMOOTHING = 1e-5
_ROWS_AT_ONCE = 8192  # vectors whose distances to all entries are in memory together


class Codebook(nn.Module):
    """One codebook. The buffers have the names of the released checkpoint.

    Args:
        size: Number of entries.
        dim: Width of an entry.
        decay: Decay of the moving averages.
        expiry_threshold: An entry that fewer vectors than this choose per batch, on average, is replaced (0: never).
    """

    def __init__(self, size: int, dim: int, *, decay: float = 0.99, expiry_threshold: float = 2.0):
        super().__init__()
        self.decay, self.expiry_threshold = decay, expiry_threshold
        self.inited: torch.Tensor
        self.cluster_size: torch.Tensor
        self.embed: torch.Tensor
        self.embed_avg: torch.Tensor
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed", torch.randn(size, dim) * dim**-0.5)
        self.register_buffer("embed_avg", self.embed.clone())

    def nearest(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the index of the nearest entry of each vector, int64 [T]."""
        lengths_E = self.embed.pow(2).sum(1)
        parts = [torch.addmm(lengths_E, part, self.embed.T, alpha=-2.0).argmin(1) for part in x_TD.split(_ROWS_AT_ONCE)]
        return torch.cat(parts)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Return the entries [T, D] of indices [T]."""
        return F.embedding(ids_T, self.embed)

    @torch.no_grad()
    def initialize(self, x_TD: torch.Tensor, iterations: int) -> None:
        """Set the entries to centers of k-means clusters of the vectors. Uses torch's random generator."""
        embed, counts = k_means(x_TD, len(self.embed), iterations)
        self.embed.copy_(embed)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(embed * counts[:, None])
        self.inited.fill_(1.0)

    @torch.no_grad()
    def update(self, x_TD: torch.Tensor, ids_T: torch.Tensor) -> None:
        """Move the entries to the mean of the vectors that chose them; replace the entries that expired."""
        counts_E = torch.bincount(ids_T, minlength=len(self.embed)).to(self.cluster_size)
        sums_ED = torch.zeros_like(self.embed_avg).index_add_(0, ids_T, x_TD)
        self.cluster_size.lerp_(counts_E, 1 - self.decay)
        self.embed_avg.lerp_(sums_ED, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed_E = (self.cluster_size + _SMOOTHING) / (total + len(self.embed) * _SMOOTHING) * total
        self.embed.copy_(self.embed_avg / smoothed_E[:, None])
        self._replace_expired(x_TD)

    def _replace_expired(self, x_TD: torch.Tensor) -> None:
        """Replace unused entries. A new entry counts as used twice as much as the threshold, so it gets some time."""
        expired = (self.cluster_size < self.expiry_threshold).nonzero()[:, 0]
        if not len(expired):
            return
        start = 2 * self.expiry_threshold
        new = random_rows(x_TD, len(expired))
        self.embed[expired] = new
        self.embed_avg[expired] = new * start
        self.cluster_size[expired] = start


class Quantized(NamedTuple):
    """The result of quantization in training.

    Attributes:
        output_TD: The sums of the chosen entries; the gradient passes to the input unchanged.
        ids_TQ: The chosen entries.
        commitment: Mean squared distance of the residuals to the chosen entries, over codebooks; a scalar.
    """

    output_TD: torch.Tensor
    ids_TQ: torch.Tensor
    commitment: torch.Tensor


class ResidualQuantizer(nn.Module):
    """A sequence of codebooks.

    Args:
        sizes: Number of entries of each.
        dim: Width of the vectors.
        expiry_threshold: See `Codebook`.
    """

    def __init__(self, sizes: tuple[int, ...], dim: int, *, expiry_threshold: float):
        super().__init__()
        self.codebooks = nn.ModuleList(Codebook(size, dim, expiry_threshold=expiry_threshold) for size in sizes)

    @property
    def books(self) -> list[Codebook]:
        """The codebooks in order."""
        return cast(list[Codebook], list(self.codebooks))

    @torch.no_grad()
    def encode(self, x_TD: torch.Tensor, codebooks: int | None = None) -> torch.Tensor:
        """Return the codes int64 [T, Q] of vectors, of the first `codebooks` codebooks (None: of all)."""
        residual, ids = x_TD.float(), []
        for codebook in self.books[:codebooks]:
            ids.append(codebook.nearest(residual))
            residual = residual - codebook(ids[-1])
        return torch.stack(ids, dim=1)

    def decode(self, ids_TQ: torch.Tensor) -> torch.Tensor:
        """Return the vectors [T, D] of codes of the first Q codebooks."""
        parts = [codebook(ids) for codebook, ids in zip(self.books, ids_TQ.unbind(1), strict=False)]
        return torch.stack(parts).sum(0)

    def forward(self, x_TD: torch.Tensor, counts_T: torch.Tensor | None = None) -> Quantized:
        """Quantize vectors in training. The codebooks do not change; see `update`.

        Args:
            x_TD: The vectors.
            counts_T: Number of codebooks that each output sums, from 1 (None: all).
        """
        output, residual = torch.zeros_like(x_TD), x_TD
        ids, commitments = [], []
        for number, codebook in enumerate(self.books):
            ids.append(codebook.nearest(residual.detach()))
            entries = codebook(ids[-1]).detach()
            commitments.append(F.mse_loss(residual, entries))
            output = output + (entries if counts_T is None else entries * (counts_T > number)[:, None])
            residual = residual - entries
        return Quantized(x_TD + (output - x_TD).detach(), torch.stack(ids, dim=1), torch.stack(commitments).mean())

    @torch.no_grad()
    def update(self, x_TD: torch.Tensor, ids_TQ: torch.Tensor) -> None:
        """Move all codebooks towards the residuals of vectors and of the codes that `forward` chose for them.

        A codebook's residuals do not depend on the number of codebooks that an output sums, so all codebooks learn from
        all vectors.
        """
        residual = x_TD.detach()
        for codebook, ids_T in zip(self.books, ids_TQ.unbind(1), strict=True):
            entries = codebook(ids_T)
            codebook.update(residual, ids_T)
            residual = residual - entries

    @torch.no_grad()
    def initialize(self, x_TD: torch.Tensor, iterations: int = 50) -> None:
        """Initialize each codebook by k-means over what the codebooks before it leave over."""
        residual = x_TD.float()
        for codebook in self.books:
            codebook.initialize(residual, iterations)
            residual = residual - codebook(codebook.nearest(residual))


def k_means(x_TD: torch.Tensor, clusters: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centers [E, D] and sizes [E] of clusters of the vectors. A center without members stays where it is."""
    centers = random_rows(x_TD, clusters)
    counts = torch.zeros(clusters, device=x_TD.device)
    for _ in range(iterations):
        nearest = torch.cat(
            [
                torch.addmm(centers.pow(2).sum(1), part, centers.T, alpha=-2.0).argmin(1)
                for part in x_TD.split(_ROWS_AT_ONCE)
            ]
        )
        counts = torch.bincount(nearest, minlength=clusters).to(x_TD.dtype)
        sums = torch.zeros_like(centers).index_add_(0, nearest, x_TD)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
    return centers, counts


def random_rows(x_TD: torch.Tensor, count: int) -> torch.Tensor:
    """Return random rows: different ones, unless more are requested than there are."""
    if len(x_TD) >= count:
        return x_TD[torch.randperm(len(x_TD), device=x_TD.device)[:count]]
    return x_TD[torch.randint(len(x_TD), (count,), device=x_TD.device)]


def perplexity(ids: torch.Tensor, size: int) -> float:
    """Return the exponential of the entropy of codes: the number of entries in use, if all were used equally often."""
    shares = torch.bincount(ids.flatten(), minlength=size).double() / max(ids.numel(), 1)
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))
