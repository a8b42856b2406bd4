"""Several answers to one prompt in one pass: the prompt is computed once, and every answer attends to it and to itself.

A group of eight answers of 16 tokens to a prompt of 40 is 168 tokens instead of 448, and gives the same numbers.

T packed tokens, S keys gathered for all queries, N query heads, G key/value heads, K key dim, V value dim.
"""

from dataclasses import dataclass

import torch

from openmimo.model.context import PackedContext, RotaryTables, RoutingTape


@dataclass(frozen=True)
class PromptGroup:
    """A prompt of `prompt` tokens, and `answers` tokens behind it in each sample. No answers: one whole sample."""

    prompt: int
    answers: tuple[int, ...] = ()


class SharedPromptContext(PackedContext):
    """The packed context of groups: each prompt, then its answers one after another. See PackedContext."""

    def __init__(
        self,
        groups: tuple[PromptGroup, ...],
        *,
        device: torch.device | str = "cpu",
        routing: RoutingTape | None = None,
    ):
        lengths = tuple(length for group in groups for length in (group.prompt, *group.answers))
        super().__init__(lengths, device=device, routing=routing)
        positions, keys, key_lengths, start = [], [], [], 0
        for group in groups:
            prompt = range(start, start + group.prompt)
            positions.append(torch.arange(group.prompt))
            keys.append(torch.arange(prompt.start, prompt.stop))
            key_lengths.append(group.prompt)
            start = prompt.stop
            for length in group.answers:
                positions.append(torch.arange(group.prompt, group.prompt + length))
                keys += [torch.arange(prompt.start, prompt.stop), torch.arange(start, start + length)]
                key_lengths.append(group.prompt + length)
                start += length
        self.positions_T = torch.cat(positions).to(device)
        self._rotary = RotaryTables(self.positions_T)
        self._keys_S, self._key_lengths = torch.cat(keys).to(device), tuple(key_lengths)

    def _seen(self, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return k_TGK.index_select(0, self._keys_S), v_TGV.index_select(0, self._keys_S)
