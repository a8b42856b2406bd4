"""Parts of tensors as boxes: a range of indices (start, stop) of each dimension."""

from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Box = tuple[tuple[int, int], ...]


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box of a whole tensor."""
    return tuple((0, size) for size in shape)


def size_of(box: Box) -> tuple[int, ...]:
    """Return the shape of a box."""
    return tuple(stop - start for start, stop in box)


def slices_of(box: Iterable[tuple[int, int]]) -> tuple[slice, ...]:
    """Return the index of a box."""
    return tuple(slice(start, stop) for start, stop in box)


def local_box(tensor: torch.Tensor) -> Box:
    """Return the part of a tensor that this process holds."""
    if not isinstance(tensor, DTensor):
        return whole_box(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple((start, start + size) for start, size in zip(offset, shape, strict=True))


def common_box(first: Box, second: Box) -> Box | None:
    """Return what two boxes of one tensor have in common; None if that is nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return common if all(start < stop for start, stop in common) else None


def inside(box: Box, outer: Box) -> Box:
    """Return a box in the coordinates of one that contains it."""
    return tuple((start - base, stop - base) for (start, stop), (base, _) in zip(box, outer, strict=True))
