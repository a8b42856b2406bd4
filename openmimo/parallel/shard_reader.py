"""A checkpoint in shards as the tensors of the Hugging Face layout, read tensor by tensor on one device."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from openmimo.core.errors import CheckpointError
from openmimo.core.files import file_in_folder, read_json, require_folder
from openmimo.data.tokenizer_files import Companions, read_companions
from openmimo.kernels.weights import Weight
from openmimo.model.config import ModelConfig
from openmimo.model.hf import Slot, slots
from openmimo.model.hf_config import config_from_hf
from openmimo.model.hf_files import CheckpointReader, Entry
from openmimo.model.mimo import MiMo
from openmimo.parallel.boxes import Box, inside, slices_of, whole_box
from openmimo.parallel.shards import ShardFolder, read_shards

_PREFIX = "model."  # of the weights among the tensors of a checkpoint
_MAX_READ_BYTES = 1 << 30


@dataclass(frozen=True)
class Place:
    """The part of a parameter or buffer that one tensor of the Hugging Face layout fills.

    Attributes:
        slot: The tensor; its target is a meta tensor.
        parameter: Name of the parameter or buffer of the model.
        box: The part, in the dimensions of the parameter.
    """

    slot: Slot
    parameter: str
    box: Box


def places(model: MiMo) -> list[Place]:
    """Return the place of every tensor of the layout, in its order. The model is plain and on the meta device."""
    bases = model.state_dict()
    by_storage = {tensor.untyped_storage()._cdata: name for name, tensor in reversed(bases.items())}
    found = []
    for slot in slots(model):
        target = slot.plain_target
        name = by_storage[target.untyped_storage()._cdata]
        found.append(Place(slot, name, _box_in(bases[name], target)))
    return found


def _box_in(base: torch.Tensor, view: torch.Tensor) -> Box:
    """Return the part of a contiguous tensor that a view of consecutive rows shows."""
    offset, box = int(view.storage_offset()), []
    lengths = (1,) * (base.ndim - view.ndim) + tuple(view.shape)
    for stride, length in zip(base.stride(), lengths, strict=True):
        start, offset = divmod(int(offset), int(stride))
        box.append((start, start + length))
    return tuple(box)


def gathered_entries(described: MiMo, gather: Callable[[str], torch.Tensor]) -> list[Entry]:
    """Return the tensors of the layout, each a part of what `gather` returns for the name of its parameter.

    Args:
        described: The model, on the meta device.
        gather: Returns a whole parameter. It is called once for the tensors of one parameter, which are consecutive.
    """
    latest = functools.lru_cache(maxsize=1)(gather)

    def part(place: Place) -> torch.Tensor:
        shape = place.slot.plain_target.shape
        return place.slot.from_checkpoint(latest(place.parameter)[slices_of(place.box)].reshape(shape).clone())

    return [
        Entry(place.slot.name, tuple(place.slot.plain_target.shape), place.slot.plain_target.dtype, load)
        for place in places(described)
        for load in [functools.partial(part, place)]
    ]


def read_model(folder: Path, model: MiMo) -> None:
    """Fill the parts that this process holds of a model with those of a checkpoint in shards."""
    read_shards(folder / "trainer" / "shards", {_PREFIX + name: tensor for name, tensor in model.state_dict().items()})


class ShardReader(CheckpointReader):
    """The tensors of a checkpoint in shards, by their names in the Hugging Face layout.

    Args:
        folder: The folder of the checkpoint.
        model: The model, on the meta device.
    """

    def __init__(self, folder: Path, model: MiMo):
        self.folder, self.adapter, self.packing = folder, None, None
        self._shards = ShardFolder(folder / "trainer" / "shards")
        self._places = {place.slot.name: place for place in places(model)}
        self._read: tuple[str, Box, torch.Tensor] | None = None
        self._check(model)

    def _check(self, model: MiMo) -> None:
        stored = self._shards.tensors
        for name, tensor in model.state_dict().items():
            if _PREFIX + name not in stored or stored[_PREFIX + name].size != tensor.shape:
                raise CheckpointError(
                    f"{self.folder} does not hold {name} of shape {list(tensor.shape)}, which its config.json implies."
                )

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._places)

    def shape(self, name: str, config: ModelConfig) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._places[name].slot.plain_target.shape)

    def problem(self, name: str, config: ModelConfig) -> str | None:
        """Return None: the files are checked when they are read."""
        return None

    def names_by_file(self, names: set[str]) -> Iterator[str]:
        """Yield `names` in the order of the parameters."""
        return (name for name in self._places if name in names)

    def read_weight(self, name: str, config: ModelConfig) -> Weight:
        """Return a tensor in float32."""
        place = self._places[name]
        if self._read is None or self._read[0] != place.parameter or not _contains(self._read[1], place.box):
            self._read = None  # before the next one is read
            box = self._slab(place)
            self._read = (place.parameter, box, self._shards.read(_PREFIX + place.parameter, box))
        _, box, part = self._read
        tensor = part[slices_of(inside(place.box, box))].view(self.shape(name, config))
        return place.slot.from_checkpoint(tensor)

    def _slab(self, place: Place) -> Box:
        """Return the part to read at once: a run of first indices of limited size that contains the place."""
        entry = self._shards.tensors[_PREFIX + place.parameter]
        if len(entry.size) < 3:
            return whole_box(entry.size)
        start, stop = place.box[0]
        row = entry.size[1:].numel() * entry.properties.dtype.itemsize
        return ((start, min(max(stop, start + _MAX_READ_BYTES // row), entry.size[0])), *whole_box(entry.size[1:]))


def _contains(outer: Box, box: Box) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, box, strict=True))


def sharded_config(folder: Path, window_keys: int | None = None) -> tuple[ModelConfig, Companions]:
    """Return the config and the tokenizer files of a checkpoint in shards. Raises CheckpointError or ConfigError."""
    path = file_in_folder(require_folder(folder), "config.json")
    if path is None:
        raise CheckpointError(f"{folder} holds no config.json; the checkpoint is damaged.")
    values = read_json(path)
    return config_from_hf(values, where=str(path), window_keys=window_keys), read_companions(folder)


def open_shards(folder: Path, window_keys: int | None) -> tuple[ModelConfig, CheckpointReader]:
    """Return the config and an open reader of a checkpoint in shards; as `model.hf.open_checkpoint`."""
    config, _ = sharded_config(folder, window_keys)
    with torch.device("meta"):
        model = MiMo(config)
    return config, ShardReader(folder, model)
