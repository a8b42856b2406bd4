"""The check before the optimizer: a step with a loss or gradients that are not finite (NaN or infinite) is not taken.

The decision is a tensor of counts. With several processes, `reduce` sums it over all of them, so that all of them take
the same branch.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from openmimo.core.errors import DivergedError
from openmimo.train.optim import GradientReport

Reduce = Callable[[torch.Tensor], torch.Tensor]


class StepGuard:
    """Decides for each step whether the optimizer may take it, and counts skipped steps.

    Attributes:
        num_skipped: Skipped steps of the run.
        skipped_in_a_row: Skipped steps since the last one that was taken.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_skipped_steps: int = 0,
        num_skipped: int = 0,
        skipped_in_a_row: int = 0,
        reduce: Reduce = lambda counts: counts,
    ):
        """
        Args:
            model: The trained model.
            max_skipped_steps: Maximum consecutive skipped steps (0: the first bad step ends the run).
            num_skipped: Initial value, for a resumed run.
            skipped_in_a_row: Initial value, for a resumed run.
            reduce: Sums a float32 tensor over all processes of the run.
        """
        self._model = model
        self._max_skipped_steps = max_skipped_steps
        self._reduce = reduce
        self.num_skipped = num_skipped
        self.skipped_in_a_row = skipped_in_a_row

    def allows_step(self, loss: torch.Tensor, gradients: GradientReport, where: str, *, has_data: bool = True) -> bool:
        """Whether the optimizer may use the gradients. If not, the step must change nothing.

        Args:
            loss: One or more losses of this process, float.
            gradients: The report of `clip_gradients`.
            where: The step and its data, for the message.
            has_data: Whether this process has a sample in the step. If no process has one, no step is taken.

        Raises:
            DivergedError: More than `max_skipped_steps` steps in a row have a loss or gradients that are not finite.
        """
        values = torch.cat([loss.detach().flatten().float(), gradients.norm[None], gradients.apart_norm[None]])
        num_bad = (~values.isfinite()).sum()
        counts = torch.stack([num_bad.float(), torch.full_like(num_bad, int(has_data)).float()])
        num_bad, num_with_data = self._reduce(counts).tolist()
        if not num_bad:
            self.skipped_in_a_row = 0 if num_with_data else self.skipped_in_a_row
            return bool(num_with_data)
        self.num_skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row <= self._max_skipped_steps:
            return False
        raise DivergedError(self._describe(loss, gradients, where))

    def check_weights(self, where: str) -> None:
        """Raises DivergedError, with the first name, if a parameter or buffer is not finite."""
        name = first_not_finite([*self._model.named_parameters(), *self._model.named_buffers()])
        num_bad = self._reduce(torch.tensor([float(name is not None)], device=next(self._model.parameters()).device))
        if num_bad.item():
            raise DivergedError(f"{where}: {name or 'a weight of another process'} is not finite.")

    def check_step(self, loss: torch.Tensor, where: str) -> None:
        """Raises DivergedError if a loss (a scalar with a graph) or one of its gradients is not finite.

        Finite weights can still be unusable, e.g. after a step with a learning rate of 1e30. Clears all gradients.
        """
        loss.backward()
        gradients = ((name, item.grad) for name, item in self._model.named_parameters() if item.grad is not None)
        name = first_not_finite([("the loss", loss), *gradients])
        self._model.zero_grad(set_to_none=True)
        if self._reduce(torch.tensor([float(name is not None)], device=loss.device)).item():
            raise DivergedError(f"{where} gives values that are not finite (first: {name or 'in another process'}).")

    def check_loss(self, loss: torch.Tensor, where: str) -> None:
        """Raises DivergedError if a loss is not finite."""
        if self._reduce((~loss.detach().isfinite()).any().float()[None]).item():
            raise DivergedError(f"{where} is not finite ({_shown(loss)}).")

    def _describe(self, loss: torch.Tensor, gradients: GradientReport, where: str) -> str:
        weights = first_not_finite([*self._model.named_parameters(), *self._model.named_buffers()])
        with_gradient = ((name, item.grad) for name, item in self._model.named_parameters() if item.grad is not None)
        if weights is not None:
            first = f"the weights of {weights} are not finite"
        elif (name := first_not_finite(with_gradient)) is not None:
            first = f"the first gradient that is not finite is that of {name}"
        else:
            first = "each gradient is finite on its own"
        skipped = f" The {self.skipped_in_a_row - 1} steps before were skipped." if self.skipped_in_a_row > 1 else ""
        return (
            f"{where} has a loss of {_shown(loss)} and a gradient norm of {float(gradients.norm):g}; {first}. The "
            f"optimizer has not taken this step.{skipped} Lower the learning rate, look at the data of this step, or "
            "let such steps be skipped with optimizer.max_skipped_steps."
        )


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first floating-point tensor that is not finite, or None."""
    floating = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not floating:
        return None
    is_finite = torch.stack([tensor.detach().isfinite().all() for _, tensor in floating]).tolist()
    return next((name for (name, _), finite in zip(floating, is_finite, strict=True) if not finite), None)


def _shown(loss: torch.Tensor) -> str:
    return ", ".join(f"{value:g}" for value in loss.detach().flatten().tolist())
