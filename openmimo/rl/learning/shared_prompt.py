"""Several responses to one prompt in one forward pass: the prompt is computed once.

Each response attends to the prompt and to itself. Eight responses of 16 tokens to a prompt of 40 are 168 tokens instead
of 448, and give the same numbers. For a prompt p0 p1 and the responses a0 a1 and b0:

    packed tokens   p0 p1 | a0 a1 | b0
    positions        0  1 |  2  3 |  2
    keys read       p0 p1 | p0 p1 a0 a1 | p0 p1 b0

T packed tokens, S keys gathered for all queries, N query heads, G key/value heads, K key dim, V value dim.
"""

from dataclasses import dataclass

import torch

from openmimo.model.context import PackedContext, RotaryTables, RoutingTape


@dataclass(frozen=True)
class PromptGroup:
    """The token counts of a prompt and of the responses that share it.

    Attributes:
        prompt: Tokens of the prompt, or of the whole sample if there are no responses.
        responses: Tokens after the prompt in each sample; empty for one whole sample.
    """

    prompt: int
    responses: tuple[int, ...] = ()


class SharedPromptContext(PackedContext):
    """The packed context of prompt groups: each prompt, followed by its responses."""

    def __init__(
        self,
        groups: tuple[PromptGroup, ...],
        *,
        device: torch.device | str = "cpu",
        routing: RoutingTape | None = None,
    ):
        lengths = tuple(length for group in groups for length in (group.prompt, *group.responses))
        super().__init__(lengths, device=device, routing=routing)
        positions, keys, key_lengths, start = [], [], [], 0
        for group in groups:
            prompt = range(start, start + group.prompt)
            positions.append(torch.arange(group.prompt))
            keys.append(torch.arange(prompt.start, prompt.stop))
            key_lengths.append(group.prompt)
            start = prompt.stop
            for length in group.responses:
                positions.append(torch.arange(group.prompt, group.prompt + length))
                keys += [torch.arange(prompt.start, prompt.stop), torch.arange(start, start + length)]
                key_lengths.append(group.prompt + length)
                start += length
        self.positions_T = torch.cat(positions).to(device)
        self._rotary = RotaryTables(self.positions_T)
        self._keys_S, self._key_lengths = torch.cat(keys).to(device), tuple(key_lengths)

    def _seen(self, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return k_TGK.index_select(0, self._keys_S), v_TGV.index_select(0, self._keys_S)
