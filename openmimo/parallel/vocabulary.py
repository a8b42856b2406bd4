"""Vocabulary parallelism: each tensor-parallel rank has some rows of the embedding and of the output head.

The loss needs no logits of other ranks. A rank computes those of its tokens of the vocabulary; the maximum, the sum of
exponentials and the logit of the label are combined over the ranks:

    rank 0    logits of tokens 0 .. V/2      max, sum, label's logit or 0  \
                                                                            -> log p(label), the same on every rank
    rank 1    logits of tokens V/2 .. V      max, sum, label's logit or 0  /

The gradient of the weight stays on its rank, that of the states is the sum over the ranks.

T tokens, M tokens of a tile, D model dim, V vocabulary, R vocabulary of one rank.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from openmimo.core.errors import ConfigError
from openmimo.kernels.operations import IGNORED_LABEL, kept_rows
from openmimo.model.heads import Head, Reader
from openmimo.model.layers import Embedding, as_dtype
from openmimo.model.mimo import MiMo
from openmimo.parallel.boxes import local_box
from openmimo.parallel.tensor import SumOverRanks

TILE_TOKENS = 512


class DividedEmbedding(Embedding):
    """The embedding of which this rank has some rows.

    Attributes:
        group: The ranks that have the other rows.
        rows: First row of this rank, and the row after its last.
    """

    group: dist.ProcessGroup
    rows: tuple[int, int]

    def forward(self, tokens_T: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `Embedding.forward`."""
        first, stop = self.rows
        is_here_T = (tokens_T >= first) & (tokens_T < stop)
        weight_RD = _local(self.weight)
        x_TD = F.embedding(torch.where(is_here_T, tokens_T - first, 0), weight_RD)
        x_TD = x_TD if dtype is None else as_dtype(x_TD, dtype)
        return SumOverRanks.apply(torch.where(is_here_T[:, None], x_TD, 0), self.group)


class DividedHead(Head):
    """The output head of which this rank has some rows.

    `logprobs`, `loss` and `argmax` need no more. Logits, and other readers of the weight, get the weight of all ranks,
    which is gathered for the call.

    Attributes:
        group: The ranks that have the other rows.
        rows: First row of this rank, and the row after its last.
    """

    group: dist.ProcessGroup
    rows: tuple[int, int]

    def forward(self, states_TD: torch.Tensor, reader: Reader | None = None, *, as_held: bool = False) -> Any:
        """As `Head.forward`; all ranks of the group call it with the same states."""
        weight_RD = as_dtype(_local(self.weight), states_TD.dtype)
        if isinstance(reader, _Divided):
            return reader.function(states_TD, weight_RD, self.rows, self.group)
        weight_VD = _AllRows.apply(weight_RD, self.rows, self.out_features, self.group)
        if reader is not None:
            return reader(states_TD, weight_VD)
        logits_TV = F.linear(states_TD, weight_VD)
        return logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()

    def logprobs(
        self, states_TD: torch.Tensor, labels_T: torch.Tensor, temperature: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        """As `Head.logprobs`."""

        def function(
            states_TD: torch.Tensor, weight_RD: torch.Tensor, rows: tuple[int, int], group: dist.ProcessGroup
        ) -> torch.Tensor:
            return _TokenLogprobs.apply(states_TD, weight_RD, labels_T, temperature, rows, group)

        return self(states_TD, _Divided(function))

    def joins(self, states_TD: torch.Tensor) -> bool:
        """As `Head.joins`; the joined loss needs the weight of all ranks."""
        return False

    def loss(
        self, states_TD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor, *, num_kept: int | None = None
    ) -> torch.Tensor:
        """As `Head.loss`."""
        kept_TD, kept_T, kept_weights_T = kept_rows(states_TD, labels_T, weights_T, num_kept)

        def function(
            states_TD: torch.Tensor, weight_RD: torch.Tensor, rows: tuple[int, int], group: dist.ProcessGroup
        ) -> torch.Tensor:
            needs_gradients = torch.is_grad_enabled() and (states_TD.requires_grad or weight_RD.requires_grad)
            weights_T = kept_weights_T.detach()
            return _TokenLoss.apply(states_TD, weight_RD, kept_T, weights_T, rows, group, needs_gradients)

        return self(kept_TD, _Divided(function))

    def argmax(self, states_TD: torch.Tensor) -> torch.Tensor:
        """As `Head.argmax`; of equal logits the first."""
        return self(states_TD, _Divided(_argmax))


class _Divided:
    """A reader of this rank's rows: function(states_TD, weight_RD, rows, group)."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function

    def __call__(self, states_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a divided head passes its rows and group")


def check_vocabulary(vocab_size: int, size: int) -> None:
    """Raise ConfigError if one of `size` ranks would have no token."""
    if (size - 1) * -(-vocab_size // size) >= vocab_size:
        raise ConfigError(f"parallel.tp is {size}, but {vocab_size} tokens leave ranks without one; lower parallel.tp.")


def divide_vocabulary(model: MiMo, mesh: DeviceMesh) -> None:
    """Replace embedding and output head by this rank's rows. Raises ConfigError if a rank would have none."""
    check_vocabulary(model.config.vocab_size, mesh.size())
    weights: dict[int, torch.nn.Parameter] = {}
    kinds = {"model.embed_tokens": DividedEmbedding, "lm_head": DividedHead}  # a pipeline stage may lack either
    for module, kind in [(module, kinds[name]) for name, module in model.named_modules() if name in kinds]:
        assert isinstance(module, (Embedding, Head))
        whole = module.weight
        if id(whole) not in weights:
            part = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
            weights[id(whole)] = torch.nn.Parameter(part, requires_grad=whole.requires_grad)
        module.__class__ = kind
        assert isinstance(module, (DividedEmbedding, DividedHead))
        module.weight = weights[id(whole)]
        module.group, module.rows = mesh.get_group(), local_box(module.weight)[0]


def _local(weight: torch.Tensor) -> torch.Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()


# --- the softmax over all ranks ---------------------------------------------------------------------------------------


class _TiledLogits:
    """Logits of this rank, of one tile of tokens at a time, and what the softmax over all ranks needs of them."""

    def __init__(
        self,
        states_TD: torch.Tensor,
        weight_RD: torch.Tensor,
        labels_T: torch.Tensor,
        temperature: float | torch.Tensor,
        rows: tuple[int, int],
        group: dist.ProcessGroup,
    ):
        self._inputs = (states_TD, weight_RD, temperature)
        self._group = group
        self.is_here_T = (labels_T >= rows[0]) & (labels_T < rows[1])
        self.column_T = torch.where(self.is_here_T, labels_T - rows[0], 0)

    def logits(self, tile: slice) -> torch.Tensor:
        """Return logits [M, R] in float32 or better."""
        states_TD, weight_RD, temperature = self._inputs
        logits_MR = (states_TD[tile] @ weight_RD.T).to(_wide(states_TD.dtype))
        if isinstance(temperature, torch.Tensor):
            return logits_MR.div_(temperature[tile, None])
        return logits_MR if temperature == 1.0 else logits_MR.div_(temperature)

    def normalized(self, tile: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return exponentials [M, R], their sum over all ranks [M], and the log-probability of each label [M]."""
        logits_MR = self.logits(tile)
        max_M = logits_MR.amax(dim=-1)
        dist.all_reduce(max_M, dist.ReduceOp.MAX, group=self._group)
        logits_MR -= max_M[:, None]
        label_M = logits_MR.gather(1, self.column_T[tile, None]).squeeze(1)
        label_M = torch.where(self.is_here_T[tile], label_M, 0)
        exponentials_MR = logits_MR.exp_()
        both_2M = torch.stack([exponentials_MR.sum(dim=-1), label_M])
        dist.all_reduce(both_2M, group=self._group)
        sum_M, label_M = both_2M
        return exponentials_MR, sum_M, label_M - sum_M.log()


class _Gradients:
    """Gradients of sum_t coefficient_t * -log p(label_t), summed over tiles."""

    def __init__(self, states_TD: torch.Tensor, weight_RD: torch.Tensor):
        self._inputs = (states_TD, weight_RD)
        self.states_TD = torch.zeros_like(states_TD)
        self.weight_RD = torch.zeros_like(weight_RD, dtype=_wide(weight_RD.dtype))

    def add(
        self, tile: slice, probabilities_MR: torch.Tensor, coefficients_M: torch.Tensor, logits: _TiledLogits
    ) -> None:
        """Add one tile; overwrites `probabilities_MR`."""
        states_TD, weight_RD = self._inputs
        coefficients_M = coefficients_M.to(probabilities_MR.dtype)
        gradient_MR = probabilities_MR.mul_(coefficients_M[:, None])
        here_M = torch.where(logits.is_here_T[tile], coefficients_M, 0)
        gradient_MR.scatter_add_(1, logits.column_T[tile, None], -here_M[:, None])
        gradient_MR = gradient_MR.to(states_TD.dtype)
        self.states_TD[tile] = gradient_MR @ weight_RD
        self.weight_RD += gradient_MR.T @ states_TD[tile]


class _TokenLoss(torch.autograd.Function):
    """-sum of weights_T * log p(label). The forward pass computes the gradients while it has the softmax of a tile."""

    @staticmethod
    def forward(
        ctx: Any,
        states_TD: torch.Tensor,
        weight_RD: torch.Tensor,
        labels_T: torch.Tensor,
        weights_T: torch.Tensor,
        rows: tuple[int, int],
        group: dist.ProcessGroup,
        needs_gradients: bool,
    ) -> torch.Tensor:
        loss = torch.zeros((), dtype=_wide(states_TD.dtype), device=states_TD.device)
        logits = _TiledLogits(states_TD, weight_RD, labels_T, 1.0, rows, group)
        gradients = _Gradients(states_TD, weight_RD) if needs_gradients else None
        for tile in _tiles(len(states_TD)):
            exponentials_MR, sum_M, logprobs_M = logits.normalized(tile)
            loss -= (weights_T[tile] * logprobs_M).sum()
            if gradients is not None:
                gradients.add(tile, exponentials_MR.div_(sum_M[:, None]), weights_T[tile], logits)
        if gradients is not None:
            dist.all_reduce(gradients.states_TD, group=group)
            ctx.save_for_backward(gradients.states_TD, gradients.weight_RD.to(weight_RD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states_TD, weight_RD = ctx.saved_tensors
        return states_TD * grad.to(states_TD.dtype), weight_RD * grad.to(weight_RD.dtype), *[None] * 5


class _TokenLogprobs(torch.autograd.Function):
    """log p(label). The backward pass computes the logits of this rank again."""

    @staticmethod
    def forward(
        ctx: Any,
        states_TD: torch.Tensor,
        weight_RD: torch.Tensor,
        labels_T: torch.Tensor,
        temperature: float | torch.Tensor,
        rows: tuple[int, int],
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        logits = _TiledLogits(states_TD, weight_RD, labels_T, temperature, rows, group)
        logprobs_T = torch.zeros(len(states_TD), dtype=_wide(states_TD.dtype), device=states_TD.device)
        for tile in _tiles(len(states_TD)):
            *_, logprobs_T[tile] = logits.normalized(tile)
        ctx.save_for_backward(states_TD, weight_RD, labels_T)
        ctx.rest = (temperature, rows, group)
        return logprobs_T.masked_fill_(labels_T == IGNORED_LABEL, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states_TD, weight_RD, labels_T = ctx.saved_tensors
        temperature, rows, group = ctx.rest
        coefficients_T = (-grad_T / temperature).masked_fill(labels_T == IGNORED_LABEL, 0.0)
        logits = _TiledLogits(states_TD, weight_RD, labels_T, temperature, rows, group)
        gradients = _Gradients(states_TD, weight_RD)
        for tile in _tiles(len(states_TD)):
            exponentials_MR, sum_M, _ = logits.normalized(tile)
            gradients.add(tile, exponentials_MR.div_(sum_M[:, None]), coefficients_T[tile], logits)
        dist.all_reduce(gradients.states_TD, group=group)
        return gradients.states_TD, gradients.weight_RD.to(weight_RD.dtype), *[None] * 4


def _argmax(
    states_TD: torch.Tensor, weight_RD: torch.Tensor, rows: tuple[int, int], group: dist.ProcessGroup
) -> torch.Tensor:
    best_T = torch.empty(len(states_TD), dtype=torch.int64, device=states_TD.device)
    for tile in _tiles(len(states_TD)):
        value_M, column_M = (states_TD[tile].detach() @ weight_RD.detach().T).max(dim=-1)
        max_M = value_M.clone()
        dist.all_reduce(max_M, dist.ReduceOp.MAX, group=group)
        token_M = torch.where(value_M == max_M, column_M + rows[0], torch.iinfo(torch.int64).max)
        dist.all_reduce(token_M, dist.ReduceOp.MIN, group=group)
        best_T[tile] = token_M
    return best_T


class _AllRows(torch.autograd.Function):
    """Returns the rows of all ranks; every rank has the gradient of all rows."""

    @staticmethod
    def forward(
        ctx: Any, weight_RD: torch.Tensor, rows: tuple[int, int], vocab_size: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.rows = rows
        weight_VD = weight_RD.new_zeros(vocab_size, weight_RD.shape[1])
        weight_VD[rows[0] : rows[1]] = weight_RD
        dist.all_reduce(weight_VD, group=group)  # the others' rows are zero; ranks may have unequal numbers
        return weight_VD

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient[ctx.rows[0] : ctx.rows[1]], None, None, None


def _tiles(num_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, TILE_TOKENS):
        yield slice(start, min(start + TILE_TOKENS, num_tokens))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
