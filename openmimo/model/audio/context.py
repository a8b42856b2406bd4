"""Attention contexts of the local transformers, which work inside a patch.

T packed tokens, N query heads, G key/value heads, K key dim, V value dim.
"""

import torch

from openmimo.kernels.attention import AttentionOut, ChosenBlocks, attend
from openmimo.model.attention import AttentionConfig
from openmimo.model.context import AttentionCall, PackedContext, RotaryTables, RouterLoss, RoutingTape


class BidirectionalContext(PackedContext):
    """Packed patches whose frames see all frames of their patch."""

    def attend(self, call: AttentionCall) -> AttentionOut:
        """As `AttentionContext.attend`, without a causal mask."""
        seen = self._keys_and_values(call)
        return attend(
            call.q_TNK,
            seen.k_SGK,
            seen.v_SGV,
            call.sink_N,
            query_lengths=self.document_lengths,
            key_lengths=seen.lengths,
            window_keys=call.window_keys,
            causal=False,
        )


class StepContext:
    """The steps of one patch in the patch decoder, one token at a time, with the keys of the steps before.

    Args:
        num_steps: The most steps.
        device: Device of the tokens.
    """

    def __init__(self, num_steps: int, device: torch.device | str = "cpu"):
        self.routing = RoutingTape()
        self.router_loss: RouterLoss | None = None
        self.block_scores: dict[int, torch.Tensor] = {}
        self.chosen_blocks: dict[tuple[int, int], ChosenBlocks] = {}
        self._all_positions = torch.arange(num_steps, device=device)
        self._tables = RotaryTables(self._all_positions)
        self._stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._num_steps = num_steps
        self.restart()

    def restart(self) -> "StepContext":
        """Begin another patch; returns self."""
        return self.at(0)

    def at(self, step: int) -> "StepContext":
        """Make this the context of a step; returns self."""
        self._step = step
        self.positions_T = self._all_positions[step : step + 1]
        return self

    def rotary(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionContext.rotary`."""
        cos_SR, sin_SR = self._tables.get(spec, dtype)
        return cos_SR[self._step : self._step + 1], sin_SR[self._step : self._step + 1]

    def attend(self, call: AttentionCall) -> AttentionOut:
        """Store the keys and values of the step, and attend to those up to it."""
        q_TNK, k_TGK, v_TGV = call.heads()
        assert k_TGK is not None and v_TGV is not None and call.window_keys is None
        if call.layer not in self._stored:
            shapes = [(self._num_steps, *tensor.shape[1:]) for tensor in (k_TGK, v_TGV)]
            self._stored[call.layer] = (k_TGK.new_zeros(shapes[0]), v_TGV.new_zeros(shapes[1]))
        keys_SGK, values_SGV = self._stored[call.layer]
        keys_SGK[self._step], values_SGV[self._step] = k_TGK[0], v_TGV[0]
        length = self._step + 1
        return attend(
            q_TNK,
            keys_SGK[:length],
            values_SGV[:length],
            call.sink_N,
            query_lengths=(1,),
            key_lengths=(length,),
            window_keys=None,
        )
