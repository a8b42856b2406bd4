"""Pipeline parallelism: the ranks of a group have different layers, and pass states forward and gradients backward.

The order of the micro-batches is that of a schedule of `torch.distributed.pipelining`. Two ranks, four micro-batches,
1F1B (F forward, B backward):

    rank 0   F0 F1 .. B0 F2 B1 F3 B2 .. B3
    rank 1   .. F0 B0 F1 B1 F2 B2 F3 B3 ..

The first stage has the embedding, the last one the final norm, the MTP heads and the output head. The MTP heads read
embeddings of shifted tokens, so that the last stage has a copy of the embedding. After the last micro-batch, both
gradients are replaced by their sum, so that the copies stay equal. The losses of the routers give their gradient at the
router (`model.moe`), so that they need no path to the last stage.

T tokens, D model dim.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from openmimo.core.errors import ConfigError
from openmimo.model.backbone import Hidden, LayerStack
from openmimo.model.config import ModelConfig
from openmimo.model.context import AttentionContext, PackedContext
from openmimo.model.heads import Head, MicroBatch
from openmimo.model.mimo import MiMo
from openmimo.parallel.stages import PipelineOptions, stage_layers

Split = Callable[[MicroBatch], tuple[MicroBatch, PackedContext]]
Loss = Callable[[list[torch.Tensor], MicroBatch], tuple[torch.Tensor, torch.Tensor]]
Seen = Callable[[PackedContext], None]
_KEPT_SCHEDULES = 8


class Stage(nn.Module):
    """The part of a model in one stage. Its modules are those of the model, which keeps their names.

    Args:
        model: The model, without the layers of other ranks.
        layers: Indices of the layers.
        is_first: Whether it begins with the embedding.
        is_last: Whether it ends with the final norm and the MTP heads.
    """

    def __init__(self, model: MiMo, layers: range, *, is_first: bool, is_last: bool):
        super().__init__()
        self.is_first, self.is_last = is_first, is_last
        self._model = (model,)  # in a tuple, so that it is not a module of this one
        self.layers = LayerStack(model.model.layers[index] for index in layers)
        if is_first or (is_last and model.config.num_mtp_heads):
            self.embed_tokens = model.model.embed_tokens
        if is_last:
            self.norm, self.mtp, self.lm_head = model.model.norm, model.model.mtp, model.lm_head

    def forward(
        self, x_TD: torch.Tensor | None, batch: MicroBatch, context: AttentionContext
    ) -> torch.Tensor | list[torch.Tensor]:
        """Return the states [T, D] for the next stage, or in the last stage the final states of every head.

        Args:
            x_TD: States of the previous stage (None in the first).
            batch: The tokens.
            context: The context of this stage.
        """
        (model,) = self._model
        if x_TD is None:
            x_TD = self.embed_tokens(batch.tokens_T, model.compute_dtype)
        x_TD = self.layers(x_TD, context)
        if not self.is_last:
            return x_TD
        hidden = Hidden(pre_norm_TD=x_TD, post_norm_TD=self.norm(x_TD))
        hidden = model(None, context, dict(enumerate(batch.shifted)), hidden=hidden)
        return [hidden.post_norm_TD, *hidden.mtp_TD.values()]


def order_gathers(stage: Stage) -> None:
    """Tell the sharded modules of a stage which weights to gather next in a backward pass.

    By itself, a module gathers what ran before it, which is wrong as soon as another micro-batch ran in between.
    """
    blocks = [*stage.layers, *(stage.mtp.layers if stage.is_last else ())]
    parts: list[nn.Module] = [stage.lm_head] if stage.is_last else []
    for block in reversed(blocks):
        parts += block.modules()  # the experts of a layer may be sharded on their own
    if "embed_tokens" in dict(stage.named_children()):
        parts.append(stage.embed_tokens)
    backward = [part for part in (*parts, stage) if isinstance(part, FSDPModule)]
    for module, following in itertools.pairwise(backward):
        module.set_modules_to_backward_prefetch([following])


class PipelinedModel(MiMo):
    """A model of which this rank has some stages.

    `head_states` and `head` are those of a whole model in a pass without gradients, and all ranks of the pipeline call
    them together. A pass with gradients goes through `Pipeline.backward`.

    Attributes:
        pipeline: The stages.
    """

    pipeline: "Pipeline"

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.compute_dtype or next(self.parameters()).dtype

    @property
    def head(self) -> Head:
        """The output head; in a pass without gradients, one whose results all ranks of the pipeline get."""
        return self.lm_head if torch.is_grad_enabled() else cast(Head, SharedHead(self))

    def head_states(self, batch: MicroBatch, context: AttentionContext) -> list[torch.Tensor]:
        """As `MiMo.head_states`. On other ranks than that of the last stage, the states have a shape but no values."""
        assert not torch.is_grad_enabled()
        return self.pipeline.head_states(batch, context)


class SharedHead:
    """The output head of the last stage, whose results all ranks get. All ranks of the pipeline call it together."""

    def __init__(self, model: PipelinedModel):
        self._model = model

    def logprobs(self, states_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """As `Head.logprobs`."""
        dtype = torch.float64 if self._model.activation_dtype == torch.float64 else torch.float32
        return self._model.pipeline.from_last(
            lambda: self._model.lm_head.logprobs(states_TD, labels_T), len(states_TD), dtype
        )

    def argmax(self, states_TD: torch.Tensor) -> torch.Tensor:
        """As `Head.argmax`."""
        return self._model.pipeline.from_last(
            lambda: self._model.lm_head.argmax(states_TD), len(states_TD), torch.int64
        )


class Pipeline:
    """The stages of one rank, and the passes of micro-batches through all stages.

    Args:
        model: A whole model. It becomes a `PipelinedModel` without the layers of other ranks, before anything else is
            distributed.
        group: The ranks of the pipeline.
        options: The division into stages and the schedule.
        device: The device of this rank.

    Attributes:
        stages: The stages of this rank, by index.

    Raises:
        ConfigError: The model cannot be divided like this.
    """

    def __init__(self, model: MiMo, group: dist.ProcessGroup, options: PipelineOptions, device: torch.device):
        layers = check_stages(model.config, options)
        self._model, self._group, self._device = model, group, device
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._num_stages = options.stages
        mine = range(self._rank, options.stages, self._size)
        self.has_last = options.stages - 1 in mine
        _keep(model, [index for stage in mine for index in layers[stage]], is_first=0 in mine, is_last=self.has_last)
        model.__class__ = PipelinedModel
        assert isinstance(model, PipelinedModel)
        model.pipeline = self
        self.stages = {
            index: Stage(model, layers[index], is_first=index == 0, is_last=index == options.stages - 1)
            for index in mine
        }
        self._schedules: dict[tuple[int, int], Any] = {}
        self._batches: Sequence[MicroBatch] = ()
        self._compute: Callable[[int, torch.Tensor | None, MicroBatch], torch.Tensor]

    def copies(self) -> list[nn.Parameter]:
        """Return the parameters of this rank that the first stage has as well."""
        return list(self._model.model.embed_tokens.parameters()) if self._has_copy and self.has_last else []

    @property
    def _has_copy(self) -> bool:
        return self._model.config.num_mtp_heads > 0

    def backward(self, batches: Sequence[MicroBatch], *, split: Split, loss: Loss, seen: Seen) -> torch.Tensor:
        """Accumulate the gradients of all micro-batches of an optimizer step, which has no gradients yet.

        Args:
            batches: The micro-batches.
            split: Returns this rank's part of a micro-batch, and a new context for one stage.
            loss: Returns the loss of the states of all heads, and each head's contribution [heads].
            seen: Called with the context after the forward pass of a stage.

        Returns:
            The contributions of all heads, float32 [heads], zero on other ranks than that of the last stage.
        """
        losses = torch.zeros(1 + self._model.config.num_mtp_heads, device=self._device)

        def compute(index: int, x_TD: torch.Tensor | None, batch: MicroBatch) -> torch.Tensor:
            part, context = split(batch)
            states = self.stages[index](x_TD, part, context)
            seen(context)
            if isinstance(states, torch.Tensor):
                return states
            total, shares = loss(states, part)
            losses.add_(shares)
            return total

        self._compute = compute
        for group in self._groups(batches):
            part, _ = split(group[0])
            self._run(group, len(part.tokens_T))
        if self._has_copy:
            self._sum_embedding_gradients()
        return losses

    def head_states(self, batch: MicroBatch, context: AttentionContext) -> list[torch.Tensor]:
        """Pass a micro-batch through all stages, one after the other, without gradients."""
        shape = (len(batch.tokens_T), self._model.config.hidden_size)
        x_TD: torch.Tensor | None = None
        result = [torch.empty((), device=self._device).expand(shape)] * (1 + len(batch.shifted))
        for index in range(self._num_stages):
            previous, here = (index - 1) % self._size, index % self._size
            if self._rank == here:
                if index:
                    x_TD = torch.empty(shape, dtype=self._model.activation_dtype, device=self._device)
                    dist.recv(x_TD, group=self._group, group_src=previous)
                states = self.stages[index](x_TD, batch, context)
                if isinstance(states, list):
                    result = states
                else:
                    x_TD = states
            elif self._rank == previous and index:
                assert x_TD is not None
                dist.send(x_TD.contiguous(), group=self._group, group_dst=here)
        return result

    def from_last(self, function: Callable[[], torch.Tensor], length: int, dtype: torch.dtype) -> torch.Tensor:
        """Return, on all ranks, the vector that a function returns on the rank of the last stage."""
        result = function() if self.has_last else torch.empty(length, dtype=dtype, device=self._device)
        assert result.dtype == dtype and len(result) == length
        dist.broadcast(result, group=self._group, group_src=(self._num_stages - 1) % self._size)
        return result

    def _groups(self, batches: Sequence[MicroBatch]) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches that one run of the schedule takes: they are equally long.

        The interleaved schedule runs rounds of equally many micro-batches, so that a remainder runs on its own.
        """
        for _, equal in itertools.groupby(batches, key=lambda batch: len(batch.tokens_T)):
            group = list(equal)
            whole = len(group) - len(group) % self._size
            if len(self.stages) > 1 and 0 < whole < len(group):
                yield group[:whole]
                group = group[whole:]
            yield group

    def _run(self, group: list[MicroBatch], num_tokens: int) -> None:
        schedule = self._schedule(len(group), num_tokens)
        self._batches = group
        numbers = torch.arange(len(group))
        inputs = (numbers,) if 0 in self.stages else ()
        schedule.step(*inputs, number=numbers, target=numbers, return_outputs=False)
        self._batches = ()

    def _schedule(self, count: int, num_tokens: int) -> Any:
        key = (count, num_tokens)
        if key not in self._schedules:
            while len(self._schedules) >= _KEPT_SCHEDULES:
                self._schedules.pop(next(iter(self._schedules)))
            stages: list[Any] = [self._torch_stage(index, num_tokens) for index in self.stages]
            if len(stages) > 1:
                self._schedules[key] = ScheduleInterleaved1F1B(stages, count, loss_fn=_given, scale_grads=False)
            elif count < self._num_stages:  # which torch's 1F1B refuses; the order of both is the same then
                self._schedules[key] = ScheduleGPipe(stages[0], count, loss_fn=_given, scale_grads=False)
            else:
                self._schedules[key] = Schedule1F1B(stages[0], count, loss_fn=_given, scale_grads=False)
        return self._schedules[key]

    def _torch_stage(self, index: int, num_tokens: int) -> PipelineStage:
        shape, dtype = (num_tokens, self._model.config.hidden_size), self._model.activation_dtype
        states = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        is_first, is_last = index == 0, index == self._num_stages - 1
        stage = _StageInTurn(
            _Called(lambda x, number: self._compute(index, None if is_first else x, self._batches[int(number)])),
            index,
            self._num_stages,
            self._device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if is_first else states,
            output_args=torch.empty((), device="meta", requires_grad=True) if is_last else states,
            group=self._group,
        )
        stage.states = (shape, dtype)
        return stage

    def _sum_embedding_gradients(self) -> None:
        """Replace the gradients of the embedding in the first and the last stage by their sum."""
        last = (self._num_stages - 1) % self._size
        if self._rank not in (0, last):
            return
        gradient = self._model.model.embed_tokens.weight.grad
        assert gradient is not None
        mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        other, peer = torch.empty_like(mine), last if self._rank == 0 else 0
        operations = [
            dist.P2POp(dist.isend, mine.contiguous(), group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self._group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        mine += other


class _StageInTurn(PipelineStage):
    """Allocates the buffers of a micro-batch when it comes and frees them after its backward pass.

    torch has one for every micro-batch of a step, from its start. Here those are on the meta device until this class
    replaces them.

    Attributes:
        states: Shape and dtype of the states of a micro-batch.
    """

    states: tuple[tuple[int, int], torch.dtype]

    def _prepare_forward_infra(self, *arguments: Any, **options: Any) -> Any:  # the versions of torch have other ones
        device, self.device = self.device, torch.device("meta")
        try:
            return super()._prepare_forward_infra(*arguments, **options)
        finally:
            self.device = device

    def _prepare_backward_infra(self, *arguments: Any, **options: Any) -> Any:
        device, self.device = self.device, torch.device("meta")
        try:
            return super()._prepare_backward_infra(*arguments, **options)
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As the base class."""
        if not self.is_first:
            self._allocate(self.args_recv_info[fwd_chunk_id], requires_grad=self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As the base class."""
        if not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id], requires_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: torch.Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """As the base class."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        received = () if self.is_first else self.args_recv_info[bwd_chunk_id]
        for states in (*received, *(() if self.is_last else self.grad_recv_info[bwd_chunk_id])):
            states.buffer = torch.empty(0)

    def _allocate(self, received: Any, *, requires_grad: bool) -> None:
        (states,) = received
        shape, dtype = self.states
        states.buffer = torch.empty(shape, dtype=dtype, device=self.device, requires_grad=requires_grad)


class _Called(nn.Module):
    """A function as a module without parameters.

    torch's stage would otherwise keep gradients unsharded until the last micro-batch, and clear those of a schedule
    that ran before.
    """

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        return self._function(x, number)


def _given(loss: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Return the loss that the last stage has computed."""
    return loss


def check_stages(config: ModelConfig, options: PipelineOptions) -> tuple[range, ...]:
    """Return the layers of each stage. Raises ConfigError if the model cannot be divided like this."""
    if config.tie_embeddings:
        raise ConfigError(
            "the model has tied embeddings, which the first and the last pipeline stage would share; set "
            "tie_embeddings false in its config, or parallel.pp 1."
        )
    return stage_layers(config, options.stages, sequence_length=options.sequence_length, boundaries=options.boundaries)


def _keep(model: MiMo, layers: Sequence[int], *, is_first: bool, is_last: bool) -> None:
    """Remove the modules that this rank does not need."""
    backbone = model.model
    backbone.layers = LayerStack(backbone.layers[index] for index in layers)
    if not (is_first or (is_last and model.config.num_mtp_heads)):
        del backbone.embed_tokens
    if not is_last:
        del backbone.norm, model.lm_head
        backbone.mtp.layers = nn.ModuleList()


def gather_from_stages(
    tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of all stages, whole, one at a time; on all ranks but the main process only its own.

    A tensor that several stages have is that of the first of them. All ranks of the run call it together.

    Args:
        tensors: The tensors of this rank's stages, which may be sharded over other ranks.
        group: The ranks of the pipeline.
        device: Device of the tensors.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    listed: list[Any] = [None] * size
    dist.all_gather_object(listed, [(name, item.shape, item.dtype) for name, item in tensors.items()], group=group)
    is_written = dist.get_global_rank(group, 0) == 0
    known: set[str] = set()
    for holder, entries in enumerate(listed):
        for name, shape, dtype in entries:
            if name in known:
                continue
            known.add(name)
            whole = None
            if rank == holder:
                tensor = tensors[name]
                whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(device)
            if is_written and holder:
                if rank == holder:
                    assert whole is not None
                    dist.send(whole.contiguous(), group=group, group_dst=0)
                elif rank == 0:
                    whole = torch.empty(shape, dtype=dtype, device=device)
                    dist.recv(whole, group=group, group_src=holder)
            if whole is not None:
                yield name, whole
