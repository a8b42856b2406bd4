"""Losses on an accelerator, a tile of tokens at a time: products of torch, and one kernel for softmax and gradient.

`tiled` has the same plan with operations of torch. Here a tile has up to TILE_TOKENS rows, since a product needs many
of them for the rate of tensor cores, and to read and write the float32 gradient of the weight for each tile takes as
long as the product of 700 to 800 rows. The gradient overwrites the logits in their own dtype, so a tile needs one
buffer; its rows are padded to whole lines of memory. Tiles of a call have nearly equal sizes.

    logits = hidden @ W.T;  the kernel makes them G = coefficient * (p - onehot);  grad hidden = G @ W
    grad W += G.T @ hidden, accumulated in float32 by the product itself

`joined` serves all heads of a model with one call: one cast of the weight and one gradient of it, in the dtype of the
weight that it gets, and the log-probabilities from which the heads' own losses follow.

Not yet run on a GPU, so it is used only where `OPENMIMO_TOKEN_LOSS=triton` asks for it: the priority is below that of
`tiled`, which serves everything.

T tokens, M tokens of a tile, D model dim, V vocabulary.
"""

from typing import Any

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import IGNORED_LABEL, TokenLossFunctions, TokenLossNeed
from openmimo.kernels.token_loss.tiled import argmax

TILE_TOKENS = 4096
TILE_MULTIPLE = 256
MAX_TILE_LOGITS = 1 << 30
_ROW_MULTIPLE = 64


def logprobs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_logprobs`. The backward pass recomputes the logits."""
    temperatures_T = temperature
    if not isinstance(temperature, torch.Tensor) and temperature != 1.0:
        temperatures_T = torch.full((len(hidden_TD),), temperature, dtype=torch.float32, device=hidden_TD.device)
    return _TokenLogprobs.apply(
        hidden_TD, weight_VD, labels_T, temperatures_T.float() if isinstance(temperatures_T, torch.Tensor) else None
    )


def loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_loss`."""
    return joined(hidden_TD, weight_VD, labels_T, weights_T)[0]


def joined(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `openmimo.kernels.operations.joined_token_loss`.

    The forward pass computes the gradients, and the backward pass only scales them, in place and once.
    """
    records = torch.is_grad_enabled()
    needs = (records and hidden_TD.requires_grad, records and weight_VD.requires_grad)
    return _TokenLoss.apply(hidden_TD, weight_VD, labels_T, weights_T.float(), needs)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        temperatures_T: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T, temperatures_T)
        rows = _Rows(hidden_TD, weight_VD, labels_T, temperatures_T)
        return rows.joined([rows.softmax(tile, None)[1] for tile in rows.tiles])

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden_TD, weight_VD, labels_T, temperatures_T = ctx.saved_tensors
        coefficients_T = -grad_T if temperatures_T is None else -grad_T / temperatures_T
        coefficients_T = coefficients_T.masked_fill(labels_T == IGNORED_LABEL, 0.0)
        rows = _Rows(hidden_TD, weight_VD, labels_T, temperatures_T)
        gradients = _Gradients(rows, *ctx.needs_input_grad[:2])
        for tile in rows.tiles:
            gradients.add(tile, rows.softmax(tile, coefficients_T[tile])[0])
        return gradients.hidden_TD, gradients.weight_in(weight_VD.dtype), None, None


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        weights_T: torch.Tensor,
        needs: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = _Rows(hidden_TD, weight_VD.to(hidden_TD.dtype), labels_T, None)
        gradients, parts = _Gradients(rows, *needs), []
        for tile in rows.tiles:
            grad_MV, logprobs_M = rows.softmax(tile, weights_T[tile] if any(needs) else None)
            parts.append(logprobs_M)
            gradients.add(tile, grad_MV)
        logprobs_T = rows.joined(parts)
        ctx.mark_non_differentiable(logprobs_T)
        ctx.gradients = (gradients.hidden_TD, gradients.weight_in(weight_VD.dtype))
        return -(weights_T * logprobs_T).sum(), logprobs_T

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        from openmimo.kernels.token_loss._triton import scale_in_place

        if ctx.gradients is None:
            raise RuntimeError("the token loss keeps its gradients for one backward pass; call the loss again")
        found, ctx.gradients = ctx.gradients, None
        for gradient in found:
            if gradient is not None:
                scale_in_place(gradient, grad)
        return *found, None, None, None


class _Rows:
    """The rows of one call in tiles, and the buffer of their logits."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        temperatures_T: torch.Tensor | None,
    ):
        self.hidden_TD, self.weight_VD = hidden_TD.contiguous(), weight_VD.contiguous()
        self._labels_T, self._temperatures_T = labels_T.contiguous(), temperatures_T
        T, V = len(hidden_TD), len(weight_VD)
        self.tiles = _tiles(T, V)
        rows = max((tile.stop - tile.start for tile in self.tiles), default=0)
        self._logits_MV = hidden_TD.new_empty(rows, -(-V // _ROW_MULTIPLE) * _ROW_MULTIPLE)[:, :V]

    def softmax(self, tile: slice, coefficients_M: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of the tile's logits, which the next call overwrites, and log p(label)."""
        from openmimo.kernels.token_loss._triton import softmax_rows

        logits_MV = self._logits_MV[: tile.stop - tile.start]
        torch.mm(self.hidden_TD[tile], self.weight_VD.T, out=logits_MV)
        temperatures_M = None if self._temperatures_T is None else self._temperatures_T[tile].contiguous()
        coefficients_M = None if coefficients_M is None else coefficients_M.contiguous()
        return logits_MV, softmax_rows(logits_MV, self._labels_T[tile], temperatures_M, coefficients_M)

    def joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the log-probabilities of all tiles, float32 [T]."""
        return torch.cat([self.hidden_TD.new_empty(0, dtype=torch.float32), *parts])


class _Gradients:
    """The gradients of hidden states and weight, each only if it is needed; the weight's in float32."""

    def __init__(self, rows: _Rows, needs_hidden: bool, needs_weight: bool):
        self._rows = rows
        self.hidden_TD = torch.empty_like(rows.hidden_TD) if needs_hidden else None
        new = torch.empty_like if rows.tiles else torch.zeros_like
        self._weight_VD = new(rows.weight_VD, dtype=torch.float32) if needs_weight else None

    def add(self, tile: slice, grad_MV: torch.Tensor) -> None:
        """Add a tile, given the gradient of its logits."""
        hidden_MD, first = self._rows.hidden_TD[tile], tile.start == 0
        if self.hidden_TD is not None:
            torch.mm(grad_MV, self._rows.weight_VD, out=self.hidden_TD[tile])
        if (total_VD := self._weight_VD) is None:
            return
        if grad_MV.dtype == total_VD.dtype:
            total_VD.addmm_(grad_MV.T, hidden_MD, beta=0 if first else 1)
        elif first:
            torch.mm(grad_MV.T, hidden_MD, out_dtype=total_VD.dtype, out=total_VD)
        else:
            torch.addmm(total_VD, grad_MV.T, hidden_MD, out_dtype=total_VD.dtype, out=total_VD)

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the gradient of the weight in `dtype`."""
        return None if self._weight_VD is None else self._weight_VD.to(dtype)


def _tiles(num_tokens: int, vocabulary: int) -> list[slice]:
    """Divide the tokens into the fewest tiles, of nearly equal sizes."""
    most = max(1, min(TILE_TOKENS, MAX_TILE_LOGITS // vocabulary))
    count = max(1, -(-num_tokens // most))
    size = -(-num_tokens // count)
    size = min(most, -(-size // TILE_MULTIPLE) * TILE_MULTIPLE)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, max(1, size))]


def refuse(need: TokenLossNeed) -> str | None:
    """Serve accelerators, and float32 in Triton's interpreter."""
    return triton_unavailable(need.on_cpu, need.dtype)


PLUGIN = Backend(priority=10, run=TokenLossFunctions(logprobs, loss, argmax, joined), refuse=refuse)
