"""What a training step keeps for its backward pass: recomputation, chunks of feed-forward layers, offloaded tensors.

Each option replaces the `forward` of single modules of a built model. Hooks of a module and a class that replaces its
class later (FSDP, expert and tensor parallelism) stay outside: the weights are gathered once for the layer, and its
parts are computed again while they are whole. Names of parameters do not change.

What is kept of a layer with `recompute`:

    layers          its input; everything else is computed twice
    but_attention   its input, and queries, keys, values and output of attention, which runs once
    attention       all but the inside of attention
    ffn             all but the inside of the FFN or the experts

T tokens, D model dim.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from openmimo.kernels.attention import AttentionOut
from openmimo.model.config import ActivationConfig
from openmimo.model.context import AttentionCall, AttentionContext
from openmimo.runtime.device import OffloadedTensor, OffloadStream

MIN_OFFLOADED_BYTES = 1 << 16
Forward = Callable[..., Any]
_DONE = "activations"  # the attribute of a layer that has its settings


def keep_activations(model: nn.Module, config: ActivationConfig, *, recompute: bool) -> None:
    """Apply the settings to the decoder layers and MTP blocks of a model, in place, before its weights are sharded.

    A module that an earlier call has changed stays as it is, so that the function can be called again after the model
    has got more MTP blocks.

    Args:
        model: A text model, or its backbone.
        config: The settings.
        recompute: Whether activations are recomputed, those that `config.recompute` names.
    """
    queue = _OffloadQueue()
    for number, layer in enumerate(_layers_of(model)):
        if _DONE in vars(layer):
            continue
        vars(layer)[_DONE] = config
        if config.ffn_chunks > 1:
            _wrap(_ffn_of(layer), functools.partial(_in_chunks, config.ffn_chunks))
        if recompute and number % config.recompute_every == 0:
            _recompute(layer, config.recompute)
        if config.offload:
            _wrap(layer, functools.partial(_offloaded, queue))


def _layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with attention and an FFN, in order of their parameters."""
    for module in model.modules():
        children = dict(module.named_children())
        if {"self_attn", "mlp"} <= children.keys():
            yield module


def _ffn_of(layer: nn.Module) -> nn.Module:
    """Return the module that is divided into chunks of tokens: the experts of a sparse layer, or the dense FFN."""
    mlp = layer.get_submodule("mlp")
    return dict(mlp.named_children()).get("experts", mlp)


def _recompute(layer: nn.Module, what: str) -> None:
    if what == "attention":
        _wrap(layer.get_submodule("self_attn"), _checkpointed)
    elif what == "ffn":
        _wrap(layer.get_submodule("mlp"), _checkpointed)
    else:
        _wrap(layer, _checkpointed if what == "layers" else _checkpointed_but_attention)


def _wrap(module: nn.Module, around: Callable[..., Any]) -> None:
    """Replace the forward of a module by `around(forward, ...)`.

    The class is read at every call, because parallelism replaces it.
    """
    inner = vars(module).get("forward") or functools.partial(_forward_of_class, module)
    vars(module)["forward"] = functools.partial(around, inner)


def _forward_of_class(module: nn.Module, *arguments: Any) -> Any:
    return type(module).forward(module, *arguments)


# --- recomputation ---------------------------------------------------------------------------------------------------


def _checkpointed(forward: Forward, *arguments: Any) -> Any:
    """Call a forward that saves only its arguments."""
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False)


def _checkpointed_but_attention(forward: Forward, *arguments: Any) -> Any:
    """Call the forward of a layer that saves its arguments and the tensors of its attention operations."""
    if not torch.is_grad_enabled():
        return forward(*arguments)
    kept: list[tuple[AttentionOut, bool]] = []
    passes = iter((True,))

    def run(*inputs: Any) -> Any:
        is_first = next(passes, False)
        *tensors, context = inputs
        seen = _FirstPass(context, kept) if is_first else _SecondPass(context, kept)
        return forward(*tensors, seen)

    return checkpoint(run, *arguments, use_reentrant=False)


class _PassOfContext:
    """The context of one pass through a recomputed layer, which calls attention in the first pass only."""

    def __init__(self, context: AttentionContext, kept: list[tuple[AttentionOut, bool]]):
        self.inner, self._kept = context, kept
        self.positions_T, self.routing, self.router_loss = context.positions_T, context.routing, context.router_loss
        self.block_scores, self.chosen_blocks = context.block_scores, context.chosen_blocks
        self.rotary = context.rotary


class _FirstPass(_PassOfContext):
    """Runs attention, whose saved tensors autograd keeps, and keeps its results."""

    def attend(self, call: AttentionCall) -> AttentionOut:
        """As `AttentionContext.attend`."""
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            result = self.inner.attend(call)
        self._kept.append((result._replace(out_TNV=result.out_TNV.detach()), result.out_TNV.requires_grad))
        return result


class _SecondPass(_PassOfContext):
    """Returns the results of the first pass in order."""

    def attend(self, call: AttentionCall) -> AttentionOut:
        """As `AttentionContext.attend`."""
        result, requires_grad = self._kept.pop(0)
        return result._replace(out_TNV=result.out_TNV.requires_grad_(requires_grad))


# --- chunks of tokens ------------------------------------------------------------------------------------------------


def _in_chunks(count: int, forward: Forward, *tensors: torch.Tensor) -> torch.Tensor:
    """Call the forward of an FFN on equal parts of the tokens, of which only the inputs are kept.

    The number of chunks does not depend on the number of tokens, so that all ranks of expert parallelism call their
    collectives equally often.
    """
    parts = zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True)
    return torch.cat([_checkpointed(forward, *part) for part in parts])


# --- offloading ------------------------------------------------------------------------------------------------------


class _OffloadQueue:
    """The saved tensors of the layers of a pass, in host memory, in the order of the layers.

    The backward pass visits the layers in reverse. When it reads the first tensor of a layer, it starts to load those
    of the layer before, so that the copies overlap with the computation.
    """

    def __init__(self) -> None:
        self.stream = OffloadStream()
        self._last: weakref.ref[_LayerTensors] | None = None

    def open(self) -> "_LayerTensors":
        """Return the record of the next layer of a pass."""
        before = self._last() if self._last is not None else None
        layer = _LayerTensors(self.stream, before)
        self._last = weakref.ref(layer)
        return layer


@dataclass(eq=False)
class _LayerTensors:
    """The offloaded tensors of one layer in one pass. Autograd holds it by them, and it holds the layer before.

    Attributes:
        stream: Copies.
        before: The layer before in the pass; None for the first, and after that one's backward pass has ended.
    """

    stream: OffloadStream
    before: "_LayerTensors | None"

    def __post_init__(self) -> None:
        self._by_identity: dict[tuple[Any, ...], OffloadedTensor] = {}
        self._sources: list[torch.Tensor] = []
        self._tensors: list[weakref.ref[OffloadedTensor]] = []

    def pack(self, tensor: torch.Tensor) -> "torch.Tensor | tuple[_LayerTensors, OffloadedTensor]":
        """Return a saved tensor, or its place in host memory."""
        is_parameter = tensor.is_leaf and tensor.requires_grad
        if is_parameter or tensor.nbytes < MIN_OFFLOADED_BYTES:
            return tensor
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if identity not in self._by_identity:
            self._sources.append(tensor)  # until the layer ends, so that no other tensor gets its address
            moved = self.stream.offload(tensor)
            self._by_identity[identity] = moved
            self._tensors.append(weakref.ref(moved))
        return self, self._by_identity[identity]

    def close(self) -> None:
        """End the forward pass of the layer: only autograd holds its tensors from now on."""
        self._by_identity.clear()
        self._sources.clear()

    def load(self) -> None:
        """Start to copy the tensors back."""
        for reference in self._tensors:
            if (tensor := reference()) is not None:
                self.stream.prefetch(tensor)

    def unpack(self, tensor: OffloadedTensor) -> torch.Tensor:
        """Return a tensor on its device, and start to load those of the layer before."""
        loaded = self.stream.load(tensor)
        if self.before is not None:
            self.before.load()
            self.before = None
        return loaded


def _unpack(kept: "torch.Tensor | tuple[_LayerTensors, OffloadedTensor]") -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    layer, tensor = kept
    return layer.unpack(tensor)


def _offloaded(queue: _OffloadQueue, forward: Forward, *arguments: Any) -> Any:
    """Call the forward of a layer whose saved tensors wait in host memory."""
    if not torch.is_grad_enabled():
        return forward(*arguments)
    layer = queue.open()
    with saved_tensors_hooks(layer.pack, _unpack):
        out = forward(*arguments)
    layer.close()
    return out
