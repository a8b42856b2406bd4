"""The optimizer step: learning rate and batch size schedules, parameter groups, clipping, and the finite check.

A step with a loss or gradients that are not finite (NaN or infinite) is skipped. The decision is a tensor of counts. In
a multi-process run, `reduce` sums it over all processes, so that all of them take the same branch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from openmimo.core.errors import DivergedError
from openmimo.model.mimo import MiMo
from openmimo.runtime.device import Arrival
from openmimo.train.config import OptimizerConfig, Phase


def build_optimizer(
    model: MiMo, config: OptimizerConfig, *, mesh_of: Callable[[torch.Tensor], object] = lambda parameter: None
) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices (embedding, projections, experts, router) only.

    Args:
        model: The model.
        config: The settings.
        mesh_of: Returns the mesh over which a parameter is distributed, or another key. A group has parameters of one
            key.
    """
    groups = []
    for named, decay in zip(parameter_groups(model), (config.weight_decay, 0.0), strict=True):
        by_mesh: dict[object, list[nn.Parameter]] = {}
        for parameter in named.values():
            by_mesh.setdefault(mesh_of(parameter), []).append(parameter)
        groups += [{"params": group, "weight_decay": decay} for group in by_mesh.values()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def parameter_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the named parameters with weight decay, and those without."""
    decayed: dict[str, nn.Parameter] = {}
    free: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 else free)[name] = parameter
    return decayed, free


@dataclass(frozen=True)
class GradientReport:
    """Statistics of the gradients of a step before clipping, as scalar tensors on the device.

    Attributes:
        norm: Norm of all gradients except the separate ones.
        num_zeros: Number of their entries that are exactly zero.
        apart_norm: Norm of the separate gradients.
    """

    norm: torch.Tensor
    num_zeros: torch.Tensor
    apart_norm: torch.Tensor


class Gradients:
    """Measures of gradients that this process holds whole."""

    def local(self, parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
        """Return the gradients of the parameters that have one."""
        return gradients_of(parameters)

    def norm(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """Return the norm of all gradients together, a scalar."""
        return torch.nn.utils.get_total_norm(gradients_of(parameters))

    def num_zeros(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """Return the number of entries of the gradients that are exactly zero, a scalar."""
        counts = [gradient.numel() - torch.count_nonzero(gradient) for gradient in gradients_of(parameters)]
        return torch.stack(counts).sum()


def clip_gradients(
    model: MiMo, max_norm: float, *, apart: Iterable[nn.Parameter] = (), gradients: Gradients | None = None
) -> GradientReport:
    """Scale all gradients so that their total norm is at most `max_norm`. Does not synchronize with the device.

    Gradients whose norm is not finite are unchanged.

    Args:
        model: The model whose gradients are scaled.
        max_norm: Maximum norm, above 0.
        apart: Parameters that are clipped separately, by their own norm.
        gradients: Measures the gradients (None: this process holds them whole).

    Returns:
        Statistics of the gradients before clipping.
    """
    gradients = gradients or Gradients()
    ids = {id(parameter) for parameter in apart}
    with_gradient = [parameter for parameter in model.parameters() if parameter.grad is not None]
    common = [parameter for parameter in with_gradient if id(parameter) not in ids]
    separate = [parameter for parameter in with_gradient if id(parameter) in ids]
    zero = torch.zeros((), device=model.device)
    return GradientReport(
        num_zeros=gradients.num_zeros(common) if common else zero.long(),
        norm=_clip(common, max_norm, gradients) if common else zero,
        apart_norm=_clip(separate, max_norm, gradients) if separate else zero,
    )


def step_unless(optimizer: torch.optim.AdamW, is_bad: torch.Tensor) -> None:
    """Take a step of a fused optimizer unless the device finds 1 in `is_bad`, a float32 scalar."""
    optimizer.found_inf = is_bad  # type: ignore[attr-defined]
    optimizer.step()


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Return the gradients of the parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _clip(parameters: list[nn.Parameter], max_norm: float, gradients: Gradients) -> torch.Tensor:
    norm = gradients.norm(parameters)
    # NaN would spread to every gradient and hide its origin.
    scale = torch.where(norm.isfinite(), max_norm / (norm + 1e-6), 1.0).clamp(max=1.0)
    torch._foreach_mul_(gradients.local(parameters), scale)
    return norm


@dataclass(frozen=True)
class SchedulePosition:
    """Position of an optimizer step in the schedule.

    Attributes:
        stage_index: Number of the stage.
        stage: The stage.
        stage_step: Step within the stage, from 0.
    """

    stage_index: int
    stage: Phase
    stage_step: int


def total_steps(stages: tuple[Phase, ...]) -> int:
    """Return the number of optimizer steps of all stages."""
    return sum(stage.steps for stage in stages)


def tokens_left(step: int, stages: tuple[Phase, ...]) -> int:
    """Tokens of all steps from `step` on. A warm-up of the batch size counts as full batches."""
    tokens = 0
    for stage in stages:
        tokens += max(0, stage.steps - max(step, 0)) * stage.global_batch_size * stage.sequence_length
        step -= stage.steps
    return tokens


def place_of(step: int, stages: tuple[Phase, ...]) -> SchedulePosition:
    """Return the position of optimizer step `step` (from 0). Steps past the end belong to the last stage."""
    for index, stage in enumerate(stages):
        if step < stage.steps or index == len(stages) - 1:
            return SchedulePosition(index, stage, step)
        step -= stage.steps
    raise AssertionError("a run has at least one stage")


def learning_rate(stage: Phase, stage_step: int) -> float:
    """Return the learning rate of a step of a stage."""
    return warmed_cosine(
        stage_step,
        steps=stage.steps,
        peak=stage.learning_rate,
        end=stage.end_learning_rate,
        warmup_steps=stage.warmup_steps,
        constant_steps=stage.constant_steps,
        linear=stage.decay == "linear",
    )


def set_schedule(optimizer: torch.optim.Optimizer, stage: Phase, stage_step: int, *, weight_decay: float) -> None:
    """Set learning rate and weight decay of a step of a stage.

    Args:
        optimizer: An optimizer of `build_optimizer`.
        stage: The stage.
        stage_step: The step.
        weight_decay: Weight decay of matrices in a stage that does not state its own.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(stage, stage_step)
        if group["params"][0].ndim >= 2:  # as in `parameter_groups`
            group["weight_decay"] = weight_decay if stage.weight_decay is None else stage.weight_decay


def warmed_cosine(
    step: int,
    *,
    steps: int,
    peak: float,
    end: float,
    warmup_steps: int,
    constant_steps: int = 0,
    linear: bool = False,
) -> float:
    """Return the learning rate of `step`: linear warm-up, constant phase, decay (paper section 3.1)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    decay_start = warmup_steps + constant_steps
    if step < decay_start or steps == decay_start:
        return peak
    progress = (step - decay_start) / (steps - decay_start)
    share = 1 - progress if linear else 0.5 * (1 + math.cos(math.pi * progress))
    return end + (peak - end) * share


def rows_of_step(stage: Phase, stage_step: int) -> int:
    """Return the number of rows of an optimizer step: a linear batch-size warm-up in multiples, then constant."""
    if stage.initial_batch_size is None or stage_step >= stage.batch_warmup_steps:
        return stage.global_batch_size
    share = stage_step / stage.batch_warmup_steps
    rows = stage.initial_batch_size + share * (stage.global_batch_size - stage.initial_batch_size)
    return round(rows / stage.batch_multiple) * stage.batch_multiple


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
        local: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ):
        """
        Args:
            model: The trained model.
            max_skipped_steps: Maximum consecutive skipped steps (0: the first bad step ends the run).
            num_skipped: Initial value, for a resumed run.
            skipped_in_a_row: Initial value, for a resumed run.
            reduce: Sums a float32 tensor over all processes of the run.
            local: Returns the part of a parameter, gradient or buffer that this process holds.
        """
        self._model = model
        self._max_skipped_steps = max_skipped_steps
        self._reduce = reduce
        self._local = local
        self.num_skipped = num_skipped
        self.skipped_in_a_row = skipped_in_a_row
        self._deferred: tuple[Arrival, str] | None = None

    def allows_step(self, loss: torch.Tensor, gradients: GradientReport, where: str, *, has_data: bool = True) -> bool:
        """Return whether the optimizer may use the gradients. If not, the step must change nothing.

        Args:
            loss: One or more losses of this process, float.
            gradients: The result of `clip_gradients`.
            where: The step and its data, for the message.
            has_data: Whether this process has samples in this step. If no process has any, the step is skipped.

        Raises:
            DivergedError: More than `max_skipped_steps` steps in a row have a loss or gradients that are not finite.
        """
        num_bad, num_with_data = self._counts(loss, gradients, has_data).tolist()
        if num_bad:
            self._skip(loss, gradients.norm, where, self._first_not_finite)
            return False
        self.skipped_in_a_row = 0 if num_with_data else self.skipped_in_a_row
        return bool(num_with_data)

    def defer(self, loss: torch.Tensor, gradients: GradientReport, where: str) -> torch.Tensor:
        """Decide on the device as `allows_step` does, without waiting for it. `settle` follows before the next step.

        Returns:
            1 if the step must change nothing, else 0, a float32 scalar.
        """
        assert self._deferred is None, "the step before is settled"
        counts = self._counts(loss, gradients, has_data=True)
        self._deferred = (Arrival((counts, loss.detach(), gradients.norm)), where)
        return (counts[0] > 0).float()

    def settle(self) -> bool | None:
        """Read the decision of the last deferred step. Returns whether it was taken, or None if there is none.

        Raises:
            DivergedError: As `allows_step`.
        """
        if self._deferred is None:
            return None
        (arrival, where), self._deferred = self._deferred, None
        counts, loss, norm = arrival.wait()
        assert counts is not None and loss is not None and norm is not None
        if counts.tolist()[0]:
            self._skip(loss, norm, where, lambda: "its gradients are not kept")
            return False
        self.skipped_in_a_row = 0
        return True

    def _counts(self, loss: torch.Tensor, gradients: GradientReport, has_data: bool) -> torch.Tensor:
        """Return the number of values that are not finite and of processes with data, float32 [2]."""
        values = torch.cat([loss.detach().flatten().float(), gradients.norm[None], gradients.apart_norm[None]])
        num_bad = (~values.isfinite()).sum()
        return self._reduce(torch.stack([num_bad.float(), torch.full_like(num_bad, int(has_data)).float()]))

    def _skip(self, loss: torch.Tensor, norm: torch.Tensor, where: str, first: Callable[[], str]) -> None:
        self.num_skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self._max_skipped_steps:
            raise DivergedError(self._describe(loss, norm, where, first()))

    def check_weights(self, where: str) -> None:
        """Raise DivergedError, with the first name, if a parameter or buffer is not finite."""
        name = first_not_finite(self._weights())
        num_bad = self._reduce(torch.tensor([float(name is not None)], device=next(self._model.parameters()).device))
        if num_bad.item():
            raise DivergedError(f"{where}: {name or 'a weight of another process'} is not finite.")

    def check_step(self, loss: torch.Tensor, where: str) -> None:
        """Raise DivergedError if a loss (a scalar with a graph) or one of its gradients is not finite.

        Finite weights can still be unusable, e.g. after a step with a learning rate of 1e30. Clears all gradients.
        """
        loss.backward()
        self.check_gradients(loss, where)

    def check_gradients(self, loss: torch.Tensor, where: str) -> None:
        """Raise DivergedError if losses or the gradients that the model has are not finite. Clears all gradients."""
        name = first_not_finite([("the loss", loss), *self._gradients()])
        self._model.zero_grad(set_to_none=True)
        if self._reduce(torch.tensor([float(name is not None)], device=loss.device)).item():
            raise DivergedError(f"{where} gives values that are not finite (first: {name or 'in another process'}).")

    def check_loss(self, loss: torch.Tensor, where: str) -> None:
        """Raise DivergedError if a loss is not finite."""
        if self._reduce((~loss.detach().isfinite()).any().float()[None]).item():
            raise DivergedError(f"{where} is not finite ({_shown(loss)}).")

    def _weights(self) -> list[tuple[str, torch.Tensor]]:
        tensors = (*self._model.named_parameters(), *self._model.named_buffers())
        return [(name, self._local(tensor)) for name, tensor in tensors]

    def _gradients(self) -> list[tuple[str, torch.Tensor]]:
        parameters = self._model.named_parameters()
        return [(name, self._local(item.grad)) for name, item in parameters if item.grad is not None]

    def _first_not_finite(self) -> str:
        weights = first_not_finite(self._weights())
        if weights is not None:
            return f"the weights of {weights} are not finite"
        if (name := first_not_finite(self._gradients())) is not None:
            return f"the first gradient that is not finite is that of {name}"
        return "each gradient is finite on its own"

    def _describe(self, loss: torch.Tensor, norm: torch.Tensor, where: str, first: str) -> str:
        skipped = f" The {self.skipped_in_a_row - 1} steps before were skipped." if self.skipped_in_a_row > 1 else ""
        return (
            f"{where} has a loss of {_shown(loss)} and a gradient norm of {float(norm):g}; {first}. The "
            f"optimizer has not taken this step.{skipped} Lower the learning rate, inspect the data of this step, or "
            "allow such steps to be skipped with optimizer.max_skipped_steps."
        )


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first floating-point tensor that is not finite, or None."""
    floating = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not floating:
        return None
    is_finite = torch.stack([tensor.detach().isfinite().all() for _, tensor in floating]).tolist()
    return next((name for (name, _), finite in zip(floating, is_finite, strict=True) if not finite), None)


def _shown(loss: torch.Tensor) -> str:
    return ", ".join(f"{value:g}" for value in loss.detach().flatten().tolist())
