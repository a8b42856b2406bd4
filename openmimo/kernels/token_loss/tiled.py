"""Log-probabilities and losses for one tile of tokens at a time: never a [T, V] tensor.

                    V = vocabulary
              +----------+----------+---+
    tile 0    |   M x V logits          |    one buffer, reused by all tiles
              +----------+----------+---+
    tile 1    | slice 0  | slice 1  |   |    gradients: slices of TILE_VOCABULARY columns
              +----------+----------+---+
    ...

A tile has at most TILE_TOKENS rows and MAX_TILE_LOGITS logits. The softmax overwrites the logits in place, and its
gradient p - onehot(label) overwrites the softmax, so a tile needs one [M, V] buffer (and one for the logits of narrower
inputs). Both products of the gradient run over slices of the vocabulary: each slice is cast to the dtype of the inputs,
and this copy stays small.

The softmax computes in float32 (float64 for float64 inputs).

T tokens, M tokens of a tile, D model dim, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import IGNORED_LABEL, TokenLossFunctions

TILE_TOKENS = 512
TILE_VOCABULARY = 4096
MAX_TILE_LOGITS = 1 << 26


def logprobs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_logprobs`. The backward pass recomputes the logits."""
    return _TokenLogprobs.apply(hidden_TD, weight_VD, labels_T, temperature)


def loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_loss`.

    If hidden or weight needs a gradient, the forward pass computes it tile by tile, while the softmax of the tile is in
    memory, and the backward pass only scales it. That is three matrix products in all, without recomputation.
    """
    needs_gradients = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _TokenLoss.apply(hidden_TD, weight_VD, labels_T, weights_T, needs_gradients)


def argmax(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_argmax`."""
    best_T = torch.empty(len(hidden_TD), dtype=torch.int64, device=hidden_TD.device)
    for tile in _tiles(len(hidden_TD), len(weight_VD)):
        best_T[tile] = (hidden_TD[tile] @ weight_VD.T).argmax(dim=-1)
    return best_T


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        temperature: float | torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T)
        ctx.temperature = temperature
        softmax = _TiledSoftmax(hidden_TD, weight_VD, labels_T, temperature)
        logprobs_T = torch.zeros(len(hidden_TD), dtype=_wide(hidden_TD.dtype), device=hidden_TD.device)
        for tile in softmax.tiles:
            _, logprobs_T[tile] = softmax(tile)
        return logprobs_T.masked_fill_(labels_T == IGNORED_LABEL, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_TD, weight_VD, labels_T = ctx.saved_tensors
        coefficients_T = (-grad_T / ctx.temperature).masked_fill(labels_T == IGNORED_LABEL, 0.0)
        softmax = _TiledSoftmax(hidden_TD, weight_VD, labels_T, ctx.temperature)
        gradients = _Gradients(hidden_TD, weight_VD)
        for tile in softmax.tiles:
            probabilities_MV, _ = softmax(tile)
            gradients.add(tile, probabilities_MV, labels_T[tile], coefficients_T[tile])
        return gradients.hidden_TD, gradients.weight_VD.to(weight_VD.dtype), None, None


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        weights_T: torch.Tensor,
        needs_gradients: bool,
    ) -> torch.Tensor:
        loss = torch.zeros((), dtype=_wide(hidden_TD.dtype), device=hidden_TD.device)
        softmax = _TiledSoftmax(hidden_TD, weight_VD, labels_T, temperature=1.0)
        gradients = _Gradients(hidden_TD, weight_VD) if needs_gradients else None
        for tile in softmax.tiles:
            probabilities_MV, logprobs_M = softmax(tile)
            loss -= (weights_T[tile] * logprobs_M).sum()
            if gradients is not None:
                gradients.add(tile, probabilities_MV, labels_T[tile], weights_T[tile])
        if gradients is not None:
            ctx.save_for_backward(gradients.hidden_TD, gradients.weight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        hidden_TD, weight_VD = ctx.saved_tensors
        return hidden_TD * grad.to(hidden_TD.dtype), weight_VD * grad.to(weight_VD.dtype), None, None, None


class _TiledSoftmax:
    """Softmax of the logits of one tile at a time, in buffers that all tiles share."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        temperature: float | torch.Tensor,
    ):
        self.tiles = list(_tiles(len(hidden_TD), len(weight_VD)))
        self._inputs = (hidden_TD, weight_VD, labels_T)
        self._temperature = temperature
        shape = (self.tiles[0].stop if self.tiles else 0, len(weight_VD))
        self._logits_MV = hidden_TD.new_empty(shape)
        wide = _wide(hidden_TD.dtype)
        self._wide_MV = None if wide == hidden_TD.dtype else hidden_TD.new_empty(shape, dtype=wide)

    def __call__(self, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities [M, V], which the next call overwrites, and the log-probability of each label [M].

        The largest probability is exp(0) / sum, so its log is -log(sum): no second pass of exponentials is needed.
        """
        hidden_TD, weight_VD, labels_T = self._inputs
        num_tokens = tile.stop - tile.start
        logits_MV = torch.mm(hidden_TD[tile], weight_VD.T, out=self._logits_MV[:num_tokens])
        wide_MV = logits_MV if self._wide_MV is None else self._wide_MV[:num_tokens].copy_(logits_MV)
        if isinstance(self._temperature, torch.Tensor):
            wide_MV.div_(self._temperature[tile, None])
        elif self._temperature != 1.0:
            wide_MV.div_(self._temperature)
        label_logits_M1 = wide_MV.gather(1, labels_T[tile].clamp(min=0)[:, None])
        relative_M1 = label_logits_M1 - wide_MV.amax(dim=-1, keepdim=True)
        probabilities_MV = torch.softmax(wide_MV, dim=-1, out=wide_MV)
        log_sum_M1 = -probabilities_MV.amax(dim=-1, keepdim=True).log()
        return probabilities_MV, (relative_M1 - log_sum_M1).squeeze(1)


class _Gradients:
    """Gradients of sum_t coefficient_t * -log p(label_t), summed over tiles; the weight's in float32 or better."""

    def __init__(self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor):
        self._inputs = (hidden_TD, weight_VD)
        self.hidden_TD = torch.empty_like(hidden_TD)
        self.weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD.dtype))

    def add(
        self, tile: slice, probabilities_MV: torch.Tensor, labels_M: torch.Tensor, coefficients_M: torch.Tensor
    ) -> None:
        """Add one tile; overwrites `probabilities_MV`. A row with coefficient 0 adds nothing."""
        hidden_TD, weight_VD = self._inputs
        coefficients_M1 = coefficients_M.to(probabilities_MV.dtype)[:, None]
        grad_MV = probabilities_MV.mul_(coefficients_M1)
        grad_MV.scatter_add_(1, labels_M.clamp(min=0)[:, None], -coefficients_M1)
        grad_hidden_MD = torch.zeros_like(hidden_TD[tile], dtype=grad_MV.dtype)
        for start in range(0, len(weight_VD), TILE_VOCABULARY):
            columns = slice(start, start + TILE_VOCABULARY)
            grad_part = grad_MV[:, columns].to(hidden_TD.dtype)
            grad_hidden_MD += grad_part @ weight_VD[columns]
            self.weight_VD[columns] += grad_part.T @ hidden_TD[tile]
        self.hidden_TD[tile] = grad_hidden_MD


def _tiles(num_tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, min(TILE_TOKENS, MAX_TILE_LOGITS // vocabulary))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


PLUGIN = Backend(priority=20, run=TokenLossFunctions(logprobs, loss, argmax), refuse=lambda need: None)
