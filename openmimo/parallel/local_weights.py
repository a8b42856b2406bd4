"""Initial weights of a model that was built and distributed on the meta device: a process fills what it holds.

A process never holds the whole model. It holds its parts and, while it fills them:

    random weights          64 MiB of one parameter, or 16 of its rows if these are more
    Hugging Face folder     its slices of one tensor; the whole tensor if it is quantized, fused or adapted
    checkpoint in shards    one part that a process has written

Random weights have the bits of `MiMo.initialize` on one process. Every process draws all numbers of the model in the
same order, because the sequence of a generator cannot be entered in the middle.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from openmimo.model.hf_files import CheckpointReader
from openmimo.model.mimo import MiMo
from openmimo.parallel.boxes import Box, common_box, inside, local_box, slices_of
from openmimo.parallel.gradients import local_part
from openmimo.parallel.shard_reader import places

MAX_DRAWN_BYTES = 64 << 20
_DRAWN_AT_ONCE = 16  # torch's normal_ draws numbers in groups of 16, from 16 numbers on


@dataclass(frozen=True)
class Unfilled:
    """The weights that a model on the meta device will have.

    Attributes:
        num_mtp_heads: MTP heads that `fill` knows; further ones are copies of the last.
        fill: Fills the parts that this process holds of a model with these heads.
    """

    num_mtp_heads: int
    fill: Callable[[MiMo], None]


@torch.no_grad()
def fill(model: MiMo, weights: Unfilled, device: torch.device) -> None:
    """Allocate the parts of a distributed model that this process holds, and fill them."""
    model.to_empty(device=device)
    model.tie_weights()
    blocks = model.model.mtp.layers
    model.model.mtp.layers = blocks[: weights.num_mtp_heads]
    weights.fill(model)
    model.model.mtp.layers = blocks
    for block in blocks[weights.num_mtp_heads :]:
        pairs = zip(block.parameters(), blocks[weights.num_mtp_heads - 1].parameters(), strict=True)
        for parameter, last in pairs:
            local_part(parameter).copy_(local_part(last))


def initialize(model: MiMo, seed: int, described: MiMo) -> None:
    """Fill the parts that this process holds as `MiMo.initialize` fills a whole model.

    Args:
        model: The model, distributed; it may lack modules.
        seed: Seed of the generator.
        described: The whole model on the meta device.
    """
    model.initialize(torch.Generator(), draw=lambda *unused: None)  # all that is not random
    held = model.state_dict()
    names = {id(parameter): name for name, parameter in described.named_parameters()}

    def draw_held(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
        draw(held.get(names[id(weight)]), weight, std, generator)

    described.initialize(torch.Generator().manual_seed(seed), draw=draw_held)


def draw(tensor: torch.Tensor | None, like: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fill the part of a tensor that this process holds as `normal_` fills the whole tensor.

    Args:
        tensor: The tensor (None: this process holds no part, and its numbers are drawn only).
        like: A tensor of its shape and dtype.
        std: Standard deviation.
        generator: The source of the numbers.
    """
    held = None if tensor is None else local_box(tensor)
    for rows in _slabs(like.shape, like.element_size()):
        box = (rows, *((0, size) for size in like.shape[1:]))
        drawn = torch.empty(rows[1] - rows[0], *like.shape[1:], dtype=like.dtype)
        drawn.normal_(std=std, generator=generator)
        if tensor is not None and held is not None and (common := common_box(box, held)):
            local_part(tensor)[slices_of(inside(common, held))].copy_(drawn[slices_of(inside(common, box))])


def _slabs(shape: Sequence[int], element_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, in whole groups of numbers, and the last of at least one group."""
    row = math.prod(shape[1:])
    step = _DRAWN_AT_ONCE // math.gcd(_DRAWN_AT_ONCE, row)
    step *= max(1, MAX_DRAWN_BYTES // (step * row * element_bytes))
    start = 0
    while start < shape[0]:
        stop = min(start + step, shape[0])
        if (shape[0] - stop) * row < _DRAWN_AT_ONCE:
            stop = shape[0]
        yield start, stop
        start = stop


def read_folder(model: MiMo, reader: CheckpointReader, described: MiMo) -> None:
    """Fill the parts that this process holds with slices of the tensors of a Hugging Face folder.

    Args:
        model: The model, distributed.
        reader: The tensors.
        described: The whole model on the meta device, which `reader` fits.
    """
    state = model.state_dict()
    by_name = {place.slot.name: place for place in places(described)}
    for name in reader.names_by_file(set(by_name)):
        place = by_name[name]
        tensor = state.get(place.parameter)
        if tensor is None:  # a module that another process has
            continue
        held = local_box(tensor)
        if (common := common_box(place.box, held)) is None:
            continue
        wanted = inside(common, place.box)[len(place.box) - place.slot.plain_target.ndim :]
        if place.slot.swaps_halves:
            part = place.slot.from_checkpoint(reader.read(name, described.config))[slices_of(wanted)]
        else:
            part = reader.read_part(name, described.config, slices_of(wanted))
        local = local_part(tensor)[slices_of(inside(common, held))]
        local.copy_(part.view(local.shape))


class StoredTensor:
    """A tensor of a checkpoint, of which a part can be read.

    Args:
        shape: The shape.
        read: Returns a part.
    """

    def __init__(self, shape: Sequence[int], read: Callable[[Box], torch.Tensor]):
        self.shape, self.read = torch.Size(shape), read

    def whole(self) -> torch.Tensor:
        """Return the whole tensor."""
        return self.read(tuple((0, size) for size in self.shape))
