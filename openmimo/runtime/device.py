"""Devices: selection, synchronization, memory and speed. The only file that names an accelerator."""

import contextlib
import functools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from openmimo.core.errors import ConfigError

Result = TypeVar("Result")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device of that name; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ConfigError: The name is unknown, or the device is absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name) if isinstance(name, (str, torch.device)) else None
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is unknown; use 'auto', 'cpu' or 'cuda'.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was requested, but torch sees no accelerator; use 'cpu' or 'auto'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {str(device)!r} was requested, but torch sees {torch.cuda.device_count()} of them.")
    return device


def device_count() -> int:
    """Return the number of accelerators that torch sees."""
    return torch.cuda.device_count()


def worker_device(device: torch.device, number: int) -> torch.device:
    """Return the device of worker `number` of a process on `device`. Workers use the other accelerators in turn."""
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return device
    current, count = device.index or 0, torch.cuda.device_count()
    return torch.device("cuda", (current + 1 + number % (count - 1)) % count)


def process_device(device: torch.device, local_rank: int) -> torch.device:
    """Return the device of a process of a run on several devices, by its number on this machine."""
    if device.type != "cuda":
        return device
    local_device = resolve_device(torch.device("cuda", local_rank))
    torch.cuda.set_device(local_device)
    return local_device


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def works_ahead(device: torch.device) -> bool:
    """Return whether the device works through a queue while the host goes on."""
    return device.type != "cpu"


class HostBlock:
    """Pinned memory, from which an accelerator copies while the host works on.

    Attributes:
        array: The memory, uint8.
    """

    def __init__(self, num_bytes: int):
        self._memory = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._sent: torch.cuda.Event | None = None
        self.array = self._memory.numpy()

    def send(self, target: torch.Tensor, num_bytes: int) -> None:
        """Queue a copy of the first bytes to `target`. Do not write before `wait`."""
        target[:num_bytes].copy_(self._memory[:num_bytes], non_blocking=True)
        self._sent = self._sent or torch.cuda.Event()
        self._sent.record(torch.cuda.current_stream(target.device))

    def wait(self) -> None:
        """Wait until the device has read what was sent last."""
        if self._sent is not None:
            self._sent.synchronize()


class OffloadedTensor:
    """A tensor of an accelerator in pinned memory of the host.

    Attributes:
        host: The copy.
        loaded: The tensor on the device again, from `prefetch` on.
    """

    def __init__(self, tensor: torch.Tensor, *, pinned: bool):
        self.device = tensor.device
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        self.loaded: torch.Tensor | None = None
        self.arrived: torch.cuda.Event | None = None


class OffloadStream:
    """Copies tensors to the host and back on a stream of their own, while the device computes. On a CPU, just copies.

    Not yet run on an accelerator.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def offload(self, tensor: torch.Tensor) -> OffloadedTensor:
        """Queue a copy to the host. The caller may drop the tensor: its memory is reused after the copy."""
        if tensor.device.type == "cpu":
            moved = OffloadedTensor(tensor, pinned=False)
            moved.host.copy_(tensor)
            return moved
        moved = OffloadedTensor(tensor, pinned=True)
        stream = self._stream_of(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            moved.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return moved

    def prefetch(self, moved: OffloadedTensor) -> None:
        """Queue the copy back, once."""
        if moved.loaded is not None:
            return
        if moved.device.type == "cpu":
            moved.loaded = moved.host
            return
        stream = self._stream_of(moved.device)
        moved.loaded = torch.empty_like(moved.host, device=moved.device)
        stream.wait_stream(torch.cuda.current_stream(moved.device))  # earlier work may still use this memory
        with torch.cuda.stream(stream):
            moved.loaded.copy_(moved.host, non_blocking=True)
        moved.loaded.record_stream(stream)
        moved.arrived = torch.cuda.Event()
        moved.arrived.record(stream)

    def load(self, moved: OffloadedTensor) -> torch.Tensor:
        """Return the tensor on its device; work that is queued from now on waits for the copy."""
        self.prefetch(moved)
        if moved.arrived is not None:
            torch.cuda.current_stream(moved.device).wait_event(moved.arrived)
        assert moved.loaded is not None
        return moved.loaded

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Arrival:
    """Copies of tensors on their way to the host. On a CPU they are there already."""

    def __init__(self, tensors: tuple[torch.Tensor | None, ...]):
        self._copies = tuple(None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in tensors)
        self._event: torch.cuda.Event | None = None
        device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> tuple[torch.Tensor | None, ...]:
        """Wait for the copies, and for nothing that was queued later."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


def uploaded(
    values: Sequence[int] | Sequence[float] | np.ndarray | torch.Tensor, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Return a tensor of `values` of the host on the device, without waiting for work that is queued there."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class CapturedGraphs:
    """Graphs of work on an accelerator, which share the memory of their intermediate results.

    The results of a replay are valid until the next replay of any of them.

    Attributes:
        num_bytes: Memory that the captures took from the device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # one, because the memory of a pool is divided by streams
        self.num_bytes = 0

    def capture(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """Run `function` twice, and capture the work that it queues. It must not wait for the device.

        Returns:
            A function that replays the work on the same tensors, and returns the results of `function`.
        """
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and makes tables
                function()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # as the capture would, so that the difference is its own memory
        before = torch.cuda.memory_reserved(self._device)
        # Only calls of this thread are checked: another one may work with another model on the device.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = function()
        self.num_bytes += torch.cuda.memory_reserved(self._device) - before

        def replay() -> Result:
            graph.replay()
            return result

        return replay


@functools.cache
def has_fused_attention(num_heads: int, num_kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Return whether a fused kernel of torch computes causal attention with this geometry on the accelerator."""
    heads = ((num_heads, key_dim), (num_kv_heads, key_dim), (num_kv_heads, value_dim))
    q, k, v = (torch.zeros(1, count, 64, dim, dtype=dtype, device="cuda", requires_grad=True) for count, dim in heads)
    call = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, num_heads != num_kv_heads)
    return (
        torch.backends.cuda.can_use_cudnn_attention(call)
        or torch.backends.cuda.can_use_flash_attention(call)
        or torch.backends.cuda.can_use_efficient_attention(call)
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process, allocated on the accelerator or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def free_memory_bytes(device: torch.device) -> int:
    """Return the free memory of the accelerator; on a CPU, MemAvailable within the limits of the control groups.

    4 GiB if the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4 * 2**30
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return min([int(line.split()[1]) * 1024, *free_cgroup_bytes()])


def free_cgroup_bytes(membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the bytes left under each memory limit of this process's control group and its ancestors.

    Inactive file pages do not count as used, because the kernel reclaims them, as in MemAvailable. Reads versions 1 and
    2 of control groups. In a container the path of the group may not be mounted; the root of the mount is then the
    group.

    Args:
        membership: Lines `number:controllers:path`.
        mount: Where the file systems of control groups are mounted.
    """
    if not membership.exists():
        return []
    free = []
    for line in membership.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, usage, inactive = mount, "memory.current", "inactive_file"
            limits = ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            root, usage, inactive = mount / "memory", "memory.usage_in_bytes", "total_inactive_file"
            limits = ["memory.limit_in_bytes"]
        else:
            continue
        group_folder = root / path.lstrip("/")
        groups = (
            [group_folder, *(group for group in group_folder.parents if group.is_relative_to(root))]
            if group_folder.is_dir()
            else [root]
        )
        for group in groups:
            limit_bytes = [int(text) for limit in limits if (text := _text(group / limit)).isdigit()]
            used = _text(group / usage)
            if limit_bytes and used.isdigit():
                free.append(max(min(limit_bytes) - int(used) + _statistic(group / "memory.stat", inactive), 0))
    return free


def _text(path: Path) -> str:
    """Return the content of a small system file; "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _statistic(path: Path, name: str) -> int:
    rows = (line.split() for line in _text(path).splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 multiply instructions. Without them, float32 products are faster."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return True  # no such file on macOS; Apple's processors have them
    words = set(cpuinfo.read_text().split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it in hardware, else float32."""
    narrow = device.type != "cpu" or cpu_multiplies_bfloat16()
    return torch.bfloat16 if narrow else torch.float32


def activation_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a config's `dtype`: a key of `DTYPES`, or "auto" for `fastest_dtype`."""
    return fastest_dtype(device) if name == "auto" else DTYPES[name]


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of the torch random generators that a run on `device` uses."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["accelerator"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore a state from `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "accelerator" in state:
        torch.cuda.set_rng_state(state["accelerator"], device)


def device_name(device: torch.device) -> str:
    """Return the model name of the accelerator, or of the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        if (cpu_info.exists())
        else []
    )
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@contextlib.contextmanager
def at_most_threads(count: int) -> Iterator[None]:
    """Limit torch to `count` CPU threads in the block."""
    before = torch.get_num_threads()
    if before <= count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product on this device, the denominator of `matmul_utilization`.

    It is below the peak of the data sheet, and varies with the clock and the load of the device.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.rand(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
