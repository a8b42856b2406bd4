"""Weights on their way from the trainer to rollout workers: one flat piece of memory, and two of it that take turns."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from openmimo.core.errors import UserError
from openmimo.model.config import ModelConfig
from openmimo.model.mimo import MiMo

_ALIGNMENT_BYTES = 64
_LOCK_SECONDS = 5.0  # it is held for microseconds

Take = Callable[[Mapping[str, torch.Tensor], int], None]


@dataclass(frozen=True)
class TensorSlice:
    """Where a tensor lies in the flat memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


@dataclass(frozen=True)
class WeightLayout:
    """Where each parameter and buffer of a model lies, one after another. Can be pickled."""

    places: tuple[TensorSlice, ...]

    @property
    def num_bytes(self) -> int:
        """Of all together."""
        return self.places[-1].stop

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in `memory`, uint8 [num_bytes], by name; nothing is copied."""
        return {
            place.name: memory[place.start : place.stop].view(place.dtype).view(place.shape) for place in self.places
        }

    def write(self, memory: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the tensors into `memory`, uint8 [num_bytes], from whatever device they are on."""
        for name, view in self.views(memory).items():
            view.copy_(tensors[name].detach())

    def empty_model(self, config: ModelConfig, device: torch.device) -> MiMo:
        """A model to read the weights into: with the dtypes of the layout, and nothing in it yet."""
        with torch.device("meta"):
            model = MiMo(config)
        own = model_tensors(model)
        for place in self.places:
            own[place.name].data = own[place.name].data.to(place.dtype)
        model = model.to_empty(device=device)
        model.tie_weights()
        return model.eval()


class WeightSource(Protocol):
    """Where a worker finds new weights."""

    @property
    def version(self) -> int:
        """Of the newest weights."""
        ...

    def read(self, take: Take) -> None:
        """Calls take(tensors by name, version) with the newest weights; again if they changed under its hands."""
        ...


class WeightBuffer:
    """The weights in memory that processes share, twice: the newest ones, and those that are being written.

    One process writes, any number reads, and no copy waits for another: a reader that was overtaken twice while it
    copied sees that and copies again. A lock guards the counts alone. Taking and releasing it also orders the copies
    before and after it in memory, which processors other than x86 do not promise by themselves. Can be handed to a
    process that is being spawned. Raises UserError if the machine has too little shared memory.
    """

    def __init__(self, layout: WeightLayout):
        self._layout = layout
        self._lock = multiprocessing.get_context("spawn").Lock()
        # For each half: how many times it or the other was written when it was (-1: it is being written), and what.
        self._counts = torch.tensor([0, -1]).share_memory_()
        self._versions = torch.tensor([-1, -1]).share_memory_()
        try:
            self._halves = torch.zeros(2, layout.num_bytes, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            raise UserError(
                f"there is no room for {2 * layout.num_bytes / 2**30:.1f} GiB of shared memory, which holds the "
                f"weights twice ({error}). Make /dev/shm larger (docker run --shm-size), or use rollouts='engine'."
            ) from error

    @property
    def version(self) -> int:
        """See WeightSource."""
        return self._newest()[2]

    def write(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Makes these the newest weights. For one process only."""
        with self._guarded():
            half = int(self._counts.argmin())
            self._counts[half] = -1
        self._layout.write(self._halves[half], tensors)
        with self._guarded():
            self._versions[half] = version
            self._counts[half] = self._counts.max() + 1

    def read(self, take: Take) -> None:
        """See WeightSource."""
        while True:
            half, count, version = self._newest()
            take(self._layout.views(self._halves[half]), version)
            with self._guarded():
                if int(self._counts[half]) == count:
                    return

    def _newest(self) -> tuple[int, int, int]:
        """The half with the newest weights, its count, and their version."""
        with self._guarded():
            half = int(self._counts.argmax())
            return half, int(self._counts[half]), int(self._versions[half])

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Holds the lock. A process that was killed while it held it is waited for no longer than a moment."""
        self._lock.acquire(timeout=_LOCK_SECONDS)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):  # two of them gave up waiting
                self._lock.release()


def layout_of(model: MiMo) -> WeightLayout:
    """The layout of a model's weights."""
    places, start = [], 0
    for name, tensor in model_tensors(model).items():
        stop = start + tensor.numel() * tensor.element_size()
        places.append(TensorSlice(name, tuple(tensor.shape), tensor.dtype, start, stop))
        start = -(-stop // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return WeightLayout(tuple(places))


def model_tensors(model: MiMo) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
