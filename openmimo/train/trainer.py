"""The training loop: stages, optimizer steps, load balancing, metrics, validation, checkpoints.

A step reads rows from the stage's loader, accumulates gradients over micro-batches, clips them, checks them with the
guard, updates the parameters, and updates the experts' selection bias. A checkpoint contains the complete state
(parameters, optimizer, positions in schedule and data), so that a killed and resumed run computes the same results as
an uninterrupted one.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from openmimo.core.errors import CheckpointError, Interrupted, StopRequest, stop_requests
from openmimo.core.metrics import MetricsWriter, TimeLeft
from openmimo.core.registry import load_object
from openmimo.data.loader import Loader
from openmimo.data.tokenizer import Tokenizer
from openmimo.kernels.weights import Packing
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.config import ModelConfig, training_flops_per_token
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.heads import MicroBatch
from openmimo.model.hf import load_model
from openmimo.model.hf_files import Entry
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import train_float8, train_packed
from openmimo.runtime.device import (
    Arrival,
    activation_dtype,
    measured_matmul_flops,
    peak_memory_bytes,
    synchronize,
    works_ahead,
)
from openmimo.train.checkpoint import Checkpoints, Progress, load_optimizer_state, optimizer_state
from openmimo.train.config import Phase, PretrainConfig
from openmimo.train.loss import evaluate, load_micro_batches, loss_of_states
from openmimo.train.optim import (
    GradientReport,
    Gradients,
    StepGuard,
    build_optimizer,
    clip_gradients,
    place_of,
    rows_of_step,
    set_schedule,
    step_unless,
    tokens_left,
    total_steps,
)

Result = TypeVar("Result")
# Whether steps are queued on an accelerator before the decision on the last one is read. No accelerator has run it yet.
QUEUES_STEPS = False


class StepReport:
    """Statistics of one optimizer step. Properties wait for the device to finish the step.

    Attributes:
        load: Number of tokens routed to each expert, int64 [E], by layer.
        tokens: Number of tokens read.
    """

    def __init__(
        self, losses: torch.Tensor, gradients: GradientReport, load: dict[int, torch.Tensor], tokens: int
    ) -> None:
        self._arrival = Arrival((losses, gradients.norm, gradients.num_zeros))
        self.load, self.tokens = load, tokens

    @property
    def losses(self) -> list[float]:
        """Mean loss of each head in nats."""
        return self._value(0).tolist()

    @property
    def gradient_norm(self) -> float:
        """Gradient norm before clipping."""
        return float(self._value(1))

    @property
    def num_zero_gradients(self) -> int:
        """Number of gradient entries that are exactly zero."""
        return int(self._value(2))

    def _value(self, place: int) -> torch.Tensor:
        tensor = self._arrival.wait()[place]
        assert tensor is not None
        return tensor


class Alone:
    """The part of one process in a run: here all of it. `parallel.ranks.Ranks` is that of one of several processes.

    All processes of a run call the methods together and in the same order.

    Attributes:
        device: The device of this process.
        is_main: Whether this process writes files and messages.
        row_rank: Index of this process among those that read different rows.
        num_row_ranks: Number of processes that read different rows.
        num_processes: Number of processes of the run.
        writes_shards: Whether a checkpoint is written in shards by all processes.
        gradients: Measures of the gradients.
    """

    is_main, row_rank, num_row_ranks, num_processes, writes_shards = True, 0, 1, 1, False

    def __init__(self, device: torch.device):
        self.device = device
        self.gradients = Gradients()

    def rows(self, rows: int) -> int:
        """Return the number of rows of an optimizer step that this process reads. Raises ConfigError."""
        return rows

    def check(self, config: ModelConfig, *, trained_as: str | None = None) -> None:
        """Raise ConfigError if a model cannot be distributed like this."""

    def apply(self, model: MiMo) -> None:
        """Distribute a model in place. What its layers keep of their activations is set already."""

    def split(
        self,
        batch: MicroBatch,
        *,
        routing: RoutingTape | None,
        balance_weight: float,
        balance_length: int | None,
        z_weight: float = 0.0,
    ) -> tuple[MicroBatch, PackedContext]:
        """Return the part of a micro-batch that this process computes, and its context."""
        return batch, PackedContext(
            batch.document_lengths,
            device=self.device,
            routing=routing,
            balance_weight=balance_weight,
            balance_length=balance_length,
            z_weight=z_weight,
        )

    def backward(
        self,
        model: MiMo,
        batches: Sequence[MicroBatch],
        *,
        split: Callable[[MicroBatch], tuple[MicroBatch, PackedContext]],
        loss: Callable[[list[torch.Tensor], MicroBatch], tuple[torch.Tensor, torch.Tensor]],
        seen: Callable[[PackedContext], None],
    ) -> torch.Tensor:
        """Accumulate the gradients of all micro-batches of an optimizer step, which has no gradients yet.

        Args:
            model: The model.
            batches: The micro-batches of this process.
            split: Calls `split` of this object. A pipeline calls it for each of its stages.
            loss: Returns the loss of the states of all heads, and each head's contribution [heads].
            seen: Called with the context after its forward pass.

        Returns:
            The contributions of all heads, float32 [heads].
        """
        losses = torch.zeros(1 + model.config.num_mtp_heads, device=self.device)
        for batch in batches:
            part, context = split(batch)
            total, shares = loss(model.head_states(part, context), part)
            total.backward()
            seen(context)
            losses += shares
        return losses

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes with different tokens."""
        return tensor

    def sum_over_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the processes that read different rows."""
        return tensor

    def sum_over_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the processes that hold different layers."""
        return tensor

    def sum_over_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        return tensor

    def max_over_all(self, value: int) -> int:
        """Return the maximum of a number over all processes."""
        return value

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a parameter, gradient or buffer that this process holds."""
        return tensor

    def like(self, parameter: torch.Tensor, whole: Any) -> torch.Tensor:
        """Return `whole`, of the shape of a parameter, distributed as the parameter is."""
        return whole

    def mesh_of(self, parameter: torch.Tensor) -> object:
        """Return the mesh of a parameter; a fused optimizer takes parameters of one mesh at a time."""
        return None

    def check_growth(self) -> None:
        """Raise ConfigError if modules cannot be added to a model that has been distributed."""

    def gathered(self, model: MiMo, optimizer_tensors: dict[str, torch.Tensor]) -> tuple[MiMo, dict[str, torch.Tensor]]:
        """Return the whole model and its optimizer's tensors, on the main process."""
        return model, optimizer_tensors

    def draw(self, config: ModelConfig, seed: int) -> MiMo:
        """Return a model with the random weights of a seed."""
        model = MiMo(config)
        model.initialize(torch.Generator().manual_seed(seed))
        return model.to(self.device)

    def load(self, path: str | Path) -> MiMo:
        """Return the model of a Hugging Face folder. Raises CheckpointError."""
        return load_model(path, dtype="float32", device=str(self.device))

    def export(self, model: MiMo, function: Callable[[list[Entry] | None], Result]) -> Result:
        """Call a function on the main process only, with the tensors to write of a model (None: the model's own)."""
        return function(None)

    def main_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on the main process, then on the others. An error of the main process ends all of them."""
        return function()

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call a function on the main process only. Returns its result (which is pickled) on all processes."""
        return function()


class Trainer:
    """Trains one run from the progress `start` to the end of its last stage.

    Args:
        config: The config of the run.
        model: The model in float32, as `ranks` draws or loads it; it is distributed in place.
        tokenizer: The tokenizer, which is saved with checkpoints.
        loaders: Loaders of the stages by number, from the current stage on.
        ranks: The part of this process in the run.
        start: The progress to start from.
        optimizer_tensors: The optimizer's state at `start` (None for a new run).
        console: Console for the progress bar and warnings.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: MiMo,
        tokenizer: Tokenizer,
        loaders: dict[int, Loader],
        *,
        ranks: Alone,
        start: Progress,
        optimizer_tensors: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ):
        self.config = config
        self.model = model.train()
        self.model.compute_dtype = activation_dtype(config.dtype, ranks.device)
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.device = ranks.device
        self.console = console or Console(stderr=True)
        self.run_folder = Path(config.run_folder)
        self.checkpoints = Checkpoints(self.run_folder, config.checkpoints)
        self._shards = self._shard_writer() if ranks.writes_shards else None
        self.metrics = MetricsWriter(self.run_folder, tensorboard=config.tensorboard) if ranks.is_main else None
        if self.metrics is not None:
            self.metrics.truncate_after(start.step or -1)  # the evaluation before the first step is repeated
        self._trace = self._open_trace(start.step) if config.expert_trace and ranks.is_main else None
        self.step, self.tokens = start.step, start.tokens
        self._loaders = loaders
        self._stage_index = -1
        self.loader = self._enter_stage(place_of(self.step, config.stages).stage_index)
        if start.loader and start.stage_index == self._stage_index:
            self.loader.load_state(start.loader)
        self._keep_activations()
        ranks.apply(self.model)
        self.optimizer = self._new_optimizer(optimizer_tensors or {})
        self._expert_step = self._new_expert_step() if config.expert_step.is_used else None
        self._placement = self._new_placement() if config.parallel.expert_placement != "off" else None
        self.guard = StepGuard(
            model,
            max_skipped_steps=config.optimizer.max_skipped_steps,
            num_skipped=start.skipped,
            skipped_in_a_row=start.skipped_in_a_row,
            reduce=ranks.sum_over_all,
            local=ranks.local,
        )
        self._probe: MicroBatch | None = None  # a micro-batch of the last step that was not skipped
        self._next_probe: MicroBatch | None = None  # the same of a step whose decision is on the device
        self._runs_ahead = (
            QUEUES_STEPS and works_ahead(self.device) and isinstance(ranks, Alone) and self._expert_step is None
        )
        self._matmul_flops = measured_matmul_flops(self.device, self.model.compute_dtype)

    def run(self, *, stop_after_step: int | None = None) -> None:
        """Train to the end or to `stop_after_step`. Writes metrics and checkpoints regularly and at the end.

        Raises:
            DivergedError: Loss, gradients or weights are not finite. The message names the newest intact checkpoint.
            Interrupted: SIGINT or SIGTERM was received. The current step was completed and its checkpoint written.
        """
        last = total_steps(self.config.stages)
        last = last if stop_after_step is None else min(last, stop_after_step)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        completed = contextlib.nullcontext() if self._shards is None else self._shards.completed()
        with self.checkpoints.named_in_errors(), completed, stop_requests() as stop:
            self.guard.check_weights(f"the model before step {self.step + 1}")
            if self._placement is not None:
                self._placement.begin(self.step)
            if self.step == 0:
                self._evaluate()
            time_left, started, steps_ahead = TimeLeft(), 0.0, 0
            with ProgressBar(*columns, console=self.console) as bar:
                task = bar.add_task("training", total=last, completed=self.step)
                while self.step < last and not self._is_stopped(stop):
                    started = started if steps_ahead else time.perf_counter()
                    stage = self._stage_of_step()
                    report = self.train_step(stage, self.step - self._steps_before_stage())
                    steps_ahead += 1
                    if self._runs_ahead and not self._is_read(last):
                        bar.update(task, completed=self.step)
                        continue
                    synchronize(self.device)
                    self._settle()
                    seconds, steps_ahead = (time.perf_counter() - started) / steps_ahead, 0
                    self._after_step(stage, report, seconds, is_last=self.step == last)
                    if said := time_left.after_step(seconds, report.tokens, tokens_left(self.step, self.config.stages)):
                        self.console.print(said)
                    bar.update(task, completed=self.step, description=f"{stage.name} loss {report.losses[0]:.3f}")
            if self._is_stopped(stop):
                if self._shards is not None:
                    self._shards.wait()  # so that all processes see the same newest checkpoint
                saved = self.checkpoints.save_before_end(self.step, self._save_completely)
                raise Interrupted(stop.signal or signal.SIGTERM, saved)
        if self._placement is not None:
            self._placement.end()
        if self.metrics is not None:
            self.metrics.close()

    def _is_stopped(self, stop: StopRequest) -> bool:
        """Whether a signal has reached any process of the run. Raises CheckpointError if a writer has failed."""
        has_failed = self._shards is not None and self._shards.has_failed
        flags = self.ranks.sum_over_all(torch.tensor([stop.signal is not None, has_failed]).float())
        if flags[1] and self._shards is not None:
            self._shards.wait()
        return bool(flags[0])

    def _shard_writer(self) -> Any:
        """Return the writer of checkpoints in shards, whose file is imported by the runs that ask for it."""
        return load_object("openmimo.train.sharded:ShardWriter")(self.checkpoints, self.ranks)

    def train_step(self, stage: Phase, stage_step: int) -> StepReport:
        """Run one optimizer step of `stage` and advance the counters. Raises DivergedError."""
        rows = rows_of_step(stage, stage_step)
        first_row = self.loader.rows_consumed
        micro_batches = load_micro_batches(
            self.loader,
            self.ranks.rows(rows),
            micro_batch_size=self.config.micro_batch_size,
            num_mtp_heads=self.model.config.num_mtp_heads,
            device=self.device,
        )
        losses, load, tokens = self._accumulate(stage, micro_batches)
        if self._expert_step is not None:
            self._expert_step.clip()
        gradients = clip_gradients(self.model, self.config.optimizer.clip_norm, gradients=self.ranks.gradients)
        where = f"step {self.step + 1} (stage {stage.name!r}, rows {first_row} to {first_row + rows - 1} of its data)"
        set_schedule(self.optimizer, stage, stage_step, weight_decay=self.config.optimizer.weight_decay)
        if self._runs_ahead:
            self._step_ahead(losses, gradients, where, load, stage.bias_rate)
            self._next_probe = micro_batches[0]
        elif self.guard.allows_step(losses, gradients, where):
            if self._expert_step is None:
                self.optimizer.step()
            else:
                self._expert_step.step(self.optimizer, load)
            for layer, router in self.model.routers().items():
                router.update_selection_bias(load[layer], stage.bias_rate)
            self._probe = micro_batches[0]
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += tokens
        return StepReport(losses, gradients, load, tokens)

    def _step_ahead(
        self,
        losses: torch.Tensor,
        gradients: GradientReport,
        where: str,
        load: dict[int, torch.Tensor],
        bias_rate: float,
    ) -> None:
        """Queue the step, which changes nothing if the device finds it bad. The host reads this one step later.

        So the host queues the next step while the device computes this one. Raises DivergedError of the step before.
        """
        self._settle()
        is_bad = self.guard.defer(losses, gradients, where)
        step_unless(self.optimizer, is_bad)
        for layer, router in self.model.routers().items():
            router.update_selection_bias(load[layer], bias_rate * (1 - is_bad))

    def _settle(self) -> None:
        """Read whether the last queued step was taken. Raises DivergedError."""
        if self.guard.settle():
            self._probe = self._next_probe

    def _is_read(self, last: int) -> bool:
        """Whether the host reads results of the step that it queued last."""
        config = self.config
        every = (config.log_every_steps, config.evaluation.every_steps, config.checkpoints.every_steps)
        return self._trace is not None or self.step == last or any(self.step % steps == 0 for steps in every)

    def _new_expert_step(self) -> Any:
        """Return the optimizer step by expert, whose file is imported by the runs that ask for it."""
        return load_object("openmimo.train.expert_step:ExpertStep")(self.model, self.config.expert_step)

    def _new_placement(self) -> Any:
        """Return the placement of experts, whose file is imported by the runs that ask for it."""
        parallel = self.config.parallel
        return load_object("openmimo.parallel.expert_placement:ExpertPlacement")(
            self.model,
            self.optimizer,
            ranks=self.ranks,
            source=parallel.expert_placement,
            every_steps=parallel.placement_every_steps,
            predictor=parallel.placement_predictor,
            run_folder=self.run_folder,
        )

    def _open_trace(self, after_step: int) -> Any:
        """Return the writer of the expert-load trace, whose file is imported by the runs that ask for it."""
        moe = self.model.config.moe
        assert moe is not None, "checked before the run"
        writer = load_object("openmimo.core.load_trace:LoadTraceWriter")
        return writer(
            self.run_folder,
            layers=list(self.model.routers()),
            num_experts=moe.num_experts,
            experts_per_token=moe.experts_per_token,
            most_tokens=max(stage.global_batch_size * stage.sequence_length for stage in self.config.stages),
            after_step=after_step,
        )

    def _accumulate(
        self, stage: Phase, micro_batches: list[MicroBatch]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], int]:
        """Accumulate the gradients of a step.

        Returns:
            Each head's mean loss, float32 [heads], the experts' load by layer, and the number of tokens, of all
            processes together.
        """
        whole = torch.stack([batch.label_counts() for batch in micro_batches]).sum(dim=0)
        tokens = sum(len(batch.tokens_T) for batch in micro_batches) * self.ranks.num_row_ranks
        counts = self.ranks.sum_over_rows(whole)
        load: dict[int, torch.Tensor] = {}

        def split(batch: MicroBatch) -> tuple[MicroBatch, PackedContext]:
            part, context = self.ranks.split(
                batch,
                routing=RoutingTape(record=True),
                balance_weight=self.config.balance_weight * len(batch.tokens_T) / tokens,
                balance_length=stage.sequence_length,
                z_weight=self.config.z_weight * len(batch.tokens_T) / tokens,
            )
            if self.config.balance_over == "batch":
                assert context.router_loss is not None, "checked by the config"
                before = dict(load)  # a pipeline adds later micro-batches before this one is recomputed
                context.router_loss = replace(context.router_loss, load_before=before, sum_over_batch=self.ranks.sum)
            return part, context

        def add_load(context: PackedContext) -> None:
            if self.model.config.moe is not None:
                context.routing.add_expert_load(load, self.model.config.moe.num_experts)

        losses = self.ranks.backward(
            self.model, micro_batches, split=split, loss=self._loss(counts, stage.mtp_weight), seen=add_load
        )
        return self.ranks.sum_over_stages(self.ranks.sum(losses)), self._whole_load(load), tokens

    def _loss(
        self, counts: torch.Tensor, mtp_weight: float
    ) -> Callable[[list[torch.Tensor], MicroBatch], tuple[torch.Tensor, torch.Tensor]]:
        return lambda states, part: loss_of_states(self.model, states, part, label_counts=counts, mtp_weight=mtp_weight)

    def _whole_load(self, load: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the experts' load of all processes together, given that of this one, by layer."""
        if self.model.config.moe is None or all(layer.ffn != "moe" for layer in self.model.config.layers):
            return {}
        none_E = torch.zeros(self.model.config.moe.num_experts, dtype=torch.int64, device=self.device)
        layers = [index for index, layer in enumerate(self.model.config.layers) if layer.ffn == "moe"]
        loads_LE = torch.stack([load.get(layer, none_E) for layer in layers])
        return dict(zip(layers, self.ranks.sum_over_stages(self.ranks.sum(loads_LE)), strict=True))

    def save(self) -> Path:
        """Write a checkpoint, or begin to write one in shards.

        Raises:
            DivergedError: The weights are not finite, or give values that are not.
            CheckpointError: The checkpoint, or the one in shards before it, cannot be written.
        """
        self._settle()
        self._check_weights()
        if self.metrics is not None:
            self.metrics.sync()
        if self._trace is not None:
            self._trace.sync()
        progress = Progress(
            self.step,
            self.tokens,
            self._stage_index,
            self.loader.state(),
            skipped=self.guard.num_skipped,
            skipped_in_a_row=self.guard.skipped_in_a_row,
        )
        with contextlib.nullcontext() if self._placement is None else self._placement.global_order():
            return self._save(progress)

    def _save(self, progress: Progress) -> Path:
        tensors = optimizer_state(self.model, self.optimizer)
        if self._shards is not None:
            return self._shards.save(self.model, tensors, self.tokenizer, progress)
        model, tensors = self.ranks.gathered(self.model, tensors)
        return self.ranks.on_main(lambda: self.checkpoints.save(model, tensors, self.tokenizer, progress))

    def _save_completely(self) -> Path:
        """Write a checkpoint, also in shards, until it is complete. Raises as `save`."""
        path = self.save()
        if self._shards is not None:
            self._shards.wait()
        return path

    def _check_weights(self) -> None:
        self.guard.check_weights(f"the model after step {self.step}")
        if self._probe is not None:
            counts = self._probe.label_counts()
            losses = self.ranks.backward(
                self.model,
                [self._probe],
                split=lambda batch: self.ranks.split(batch, routing=None, balance_weight=0.0, balance_length=None),
                loss=self._loss(counts, 1.0),
                seen=lambda context: None,
            )
            self.guard.check_gradients(losses, f"the model after step {self.step}, on a micro-batch of that step,")

    def _stage_of_step(self) -> Phase:
        position = place_of(self.step, self.config.stages)
        if position.stage_index != self._stage_index:
            self.loader.close()
            self.loader = self._enter_stage(position.stage_index)
        return position.stage

    def _keep_activations(self) -> None:
        """Apply the settings of what a step keeps to the layers that do not have them yet."""
        recompute = self.config.activation_checkpointing
        checkpoint_activations(self.model.model, self.config.activations, recompute=recompute)

    def _steps_before_stage(self) -> int:
        return sum(stage.steps for stage in self.config.stages[: self._stage_index])

    def _enter_stage(self, index: int) -> Loader:
        """Apply the stage's changes to the model, and return its loader."""
        stage, is_running = self.config.stages[index], self._stage_index >= 0
        self._stage_index = index
        self.model.extend_context(
            full_rope_theta=stage.full_rope_theta,
            max_positions=stage.sequence_length,
            full_rope_scaling=None if stage.full_rope_scaling.kind == "none" else stage.full_rope_scaling,
        )
        if self.config.quantization != "none":
            train_packed(self.model, Packing(self.config.quantization, self.config.quantization_stages))
        if self.config.fp8:
            train_float8(self.model)
        if stage.mtp_heads is not None and stage.mtp_heads > self.model.config.num_mtp_heads:
            if is_running:
                self.ranks.check_growth()
            kept = optimizer_state(self.model, self.optimizer) if is_running else {}
            self.model.replicate_mtp_heads(stage.mtp_heads)
            if is_running:
                self._keep_activations()
                self.optimizer = self._new_optimizer(kept)
        return self._loaders[index]

    def _new_optimizer(self, tensors: Mapping[str, Any]) -> torch.optim.AdamW:
        optimizer = build_optimizer(self.model, self.config.optimizer, mesh_of=self.ranks.mesh_of)
        load_optimizer_state(self.model, optimizer, tensors, like=self.ranks.like)
        return optimizer

    def _after_step(self, stage: Phase, report: StepReport, seconds: float, *, is_last: bool) -> None:
        if self._trace is not None:
            self._trace.write(self.step, torch.stack(list(report.load.values())).cpu().numpy())
        if self.step % self.config.log_every_steps == 0 or is_last or self.guard.skipped_in_a_row:
            self._write(self._step_metrics(stage, report, seconds))
        if self.step % self.config.evaluation.every_steps == 0 or is_last:
            self._evaluate()
        if is_last:
            self.save()
        elif self.step % self.config.checkpoints.every_steps == 0:
            try:
                self.save()
            except CheckpointError as error:
                if not isinstance(self.ranks, Alone):
                    raise  # the other processes do not know of it
                self.console.print(f"[yellow]warning:[/] {error} Training continues.", soft_wrap=True)
        if self._placement is not None and not is_last and (values := self._placement.after_step(self.step)):
            self._write({"stage": stage.name, **values})

    def _write(self, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, values)

    def _step_metrics(self, stage: Phase, report: StepReport, seconds: float) -> dict:
        flops = training_flops_per_token(self.model.config, stage.sequence_length) * report.tokens
        values = {
            "stage": stage.name,
            "tokens": self.tokens,
            "loss/main": report.losses[0],
            **{f"loss/mtp_{head}": loss for head, loss in enumerate(report.losses[1:])},
            "gradient/norm": report.gradient_norm,
            "gradient/num_zeros": report.num_zero_gradients,
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens_per_second": report.tokens / seconds,
            "flops": flops,
            "matmul_utilization": flops / seconds / (self._matmul_flops * self.ranks.num_processes),
            "skipped_steps": self.guard.num_skipped,
            "memory_bytes": self.ranks.max_over_all(peak_memory_bytes(self.device)),
        }
        for layer, load_E in report.load.items():
            values[f"expert_load/max_over_mean_{layer}"] = float(load_E.max() / load_E.float().mean())
        if self._placement is not None:
            values |= self._placement.load_metrics(report.load)
        if report.load:
            values["expert_load/by_layer"] = [load_E.tolist() for load_E in report.load.values()]
        return values

    def _evaluate(self) -> None:
        stage = self.config.stages[self._stage_index]
        if stage.mixture.validation_fraction == 0.0:
            return
        batches = self.loader.fixed_batches(self.config.micro_batch_size, self.config.evaluation.batches)
        result = evaluate(self.model, batches, stage.sequence_length)
        self.model.train()
        self._write({"stage": stage.name, **result.metrics()})
        self.guard.check_loss(torch.tensor(result.losses), f"the held-out loss after step {self.step}")
