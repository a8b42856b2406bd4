"""Transfer of weights from the trainer to rollout workers through flat memory.

A layout gives each tensor a slice of one flat uint8 buffer. A shared buffer has two such halves, which take turns:

    half 0   version 6 (old)  ->  the writer fills it with version 8  ->  newest
    half 1   version 7 (newest, readers copy it)                      ->  old
"""

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
    """The bytes [start, stop) of a tensor in the flat memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


@dataclass(frozen=True)
class WeightLayout:
    """The slices of all parameters and buffers of a model, one after another. Can be pickled."""

    slices: tuple[TensorSlice, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the flat memory."""
        return self.slices[-1].stop

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of the tensors in `memory`, uint8 [num_bytes], by name."""
        return {part.name: memory[part.start : part.stop].view(part.dtype).view(part.shape) for part in self.slices}

    def write(self, memory: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors, from any device, into `memory`, uint8 [num_bytes]."""
        for name, view in self.views(memory).items():
            view.copy_(tensors[name].detach())

    def empty_model(self, config: ModelConfig, device: torch.device) -> MiMo:
        """A model with the dtypes of the layout and uninitialized weights."""
        with torch.device("meta"):
            model = MiMo(config)
        tensors = model_tensors(model)
        for part in self.slices:
            tensors[part.name].data = tensors[part.name].data.to(part.dtype)
        model = model.to_empty(device=device)
        model.tie_weights()
        return model.eval()


class WeightSource(Protocol):
    """The source of a worker's weights."""

    @property
    def version(self) -> int:
        """The version of the newest weights."""
        ...

    def read(self, take: Take) -> None:
        """Call take(tensors by name, version) with the newest weights, again if they changed meanwhile."""
        ...


class WeightBuffer:
    """Two copies of the weights in shared memory: the newest one, and one that is being written.

    One process writes, and any number of processes read. No copy waits for another: each write gives its half a new
    count, so a reader whose half was overwritten during its copy sees another count and copies again. The lock guards
    the counts only. Acquiring and releasing it also orders the memory accesses of the copies, which processors other
    than x86 do not guarantee otherwise. A buffer can be passed to a process that is being spawned.

    Raises:
        UserError: The machine has too little shared memory.
    """

    def __init__(self, layout: WeightLayout):
        self._layout = layout
        self._lock = multiprocessing.get_context("spawn").Lock()
        # By half: the number of the write that filled it (-1: it is being written), and the version in it.
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
        return self._newest()[2]

    def write(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Write the newest weights. Only one process may call this."""
        with self._guarded():
            half = int(self._counts.argmin())
            self._counts[half] = -1
        self._layout.write(self._halves[half], tensors)
        with self._guarded():
            self._versions[half] = version
            self._counts[half] = self._counts.max() + 1

    def read(self, take: Take) -> None:
        while True:
            half, count, version = self._newest()
            take(self._layout.views(self._halves[half]), version)
            with self._guarded():
                if int(self._counts[half]) == count:
                    return

    def _newest(self) -> tuple[int, int, int]:
        """The half with the newest weights, the number of its write, and the version."""
        with self._guarded():
            half = int(self._counts.argmax())
            return half, int(self._counts[half]), int(self._versions[half])

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Hold the lock. Gives up waiting after _LOCK_SECONDS, as a process may be killed while it holds the lock."""
        self._lock.acquire(timeout=_LOCK_SECONDS)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):  # two processes gave up waiting
                self._lock.release()


def layout_of(model: MiMo) -> WeightLayout:
    """The layout of a model's weights."""
    slices, start = [], 0
    for name, tensor in model_tensors(model).items():
        stop = start + tensor.numel() * tensor.element_size()
        slices.append(TensorSlice(name, tuple(tensor.shape), tensor.dtype, start, stop))
        start = -(-stop // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return WeightLayout(tuple(slices))


def model_tensors(model: MiMo) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; tied tensors once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
