"""The C kernels of this folder, compiled on this machine at their first use.

`library()` returns the loaded library, or None without a working C compiler; every operation then falls back to torch.
The library is built in the folder `native/` of `$OPENMIMO_CACHE` (default: `~/.cache/openmimo`). Its file name is a
hash of sources, compiler, flags and processor. `$CC` names another compiler; `OPENMIMO_NATIVE=0` disables the kernels.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch  # imported before the library is loaded, which then uses torch's OpenMP runtime

from openmimo.core.files import cache_folder

DTYPES = (torch.float32, torch.bfloat16)  # dtypes of the kernels' inputs

SOURCES = Path(__file__).parent
# No -ffast-math: the kernels fix the order of their sums, on which batch invariance depends.
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Tried in turn: not every compiler supports OpenMP or -march=native.
_ATTEMPTS = (("-march=native", "-fopenmp"), ("-march=native",), ())
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 300
_FIRST_CPU_LINES = ("model name", "flags", "Features", "CPU part")


class BuildError(Exception):
    """The library cannot be built; the message is the reason."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None if they are disabled or cannot be built (with one warning)."""
    if os.environ.get("OPENMIMO_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(build(find_compiler())))
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"the C kernels are not used, and decoding on the CPU is slower: {error}. Install a C compiler (Debian: "
            "apt install gcc; macOS: xcode-select --install), or name one in $CC; OPENMIMO_NATIVE=0 silences this.",
            stacklevel=2,
        )
        return None


class Function:
    """A function of the library that takes packed structs and returns an int (0 for success) or nothing.

    A backend calls `function.call(function.pack(...))`. The first call looks the function up, which may compile the
    library.

    Args:
        name: Name in the C sources.
        layout: Fields of the struct, in the format characters of the module `struct`.
        num_arguments: Number of packed structs; `layout` is that of the first.
    """

    def __init__(self, name: str, layout: str, *, num_arguments: int = 1):
        self.pack = struct.Struct(layout).pack
        self._name, self._num_arguments = name, num_arguments

    @functools.cached_property
    def call(self) -> Callable[..., int]:
        """The C function. The library must be loaded, as it is for every need that `refuse` accepts."""
        kernels = library()
        assert kernels is not None, "refused before"
        function = kernels[self._name]
        function.argtypes, function.restype = (ctypes.c_char_p,) * self._num_arguments, ctypes.c_int
        return function


class Need(Protocol):
    """The fields that the needs of all operations with C kernels have."""

    @property
    def on_cpu(self) -> bool:
        """Whether the tensors are in CPU memory."""

    @property
    def needs_gradients(self) -> bool:
        """Whether autograd records the call."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""


def refuse(need: Need) -> str | None:
    """Return the reason why no C kernel serves a need, or None."""
    if not need.on_cpu:
        return "it runs on CPUs only"
    if need.needs_gradients:
        return "it has no backward pass"
    if need.dtype not in DTYPES:
        return f"it computes float32 and bfloat16, not {need.dtype}"
    if library() is None:
        return "the native library is missing"
    return None


def find_compiler() -> list[str]:
    """Return the command in $CC, or the first compiler that is installed. Raises BuildError if there is none."""
    command = shlex.split(os.environ.get("CC", ""))
    if command:
        return command
    found = next((path for path in map(shutil.which, _COMPILERS) if path), None)
    if found is None:
        raise BuildError(f"there is no C compiler ({', '.join(_COMPILERS)})")
    return [found]


def build(compiler: list[str]) -> Path:
    """Compile the sources with `compiler` and return the path of the library; an existing library is reused.

    Concurrent processes are safe: each writes a temporary file and renames it atomically.

    Raises:
        OSError, SubprocessError: The compiler does not run.
        BuildError: The sources do not compile; the message has the compiler's last line.
    """
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS
    ).stdout
    target = _folder() / f"{_fingerprint(compiler, version)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        _compile(compiler, unfinished)
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return target


def _compile(compiler: list[str], output: str) -> None:
    files = [str(path) for path in _files("*.c")]
    for more_flags in _ATTEMPTS:
        command = [*compiler, *_FLAGS, *more_flags, "-o", output, *files, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        if done.returncode == 0:
            return
    lines = (done.stderr or done.stdout).strip().splitlines()
    raise BuildError(f"{compiler[0]} failed ({lines[-1] if lines else f'exit status {done.returncode}'})")


def _folder() -> Path:
    """Return the folder of the built libraries. It may be deleted at any time."""
    return cache_folder() / "native"


def _fingerprint(compiler: list[str], version: str) -> str:
    """Return a hash of the sources, the compiler, its flags and the processor."""
    digest = hashlib.sha256(repr((compiler, version, _FLAGS, _ATTEMPTS, _processor())).encode())
    for path in _files("*.[ch]"):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _files(pattern: str) -> list[Path]:
    return sorted(SOURCES.glob(pattern))


def _processor() -> str:
    """Return the properties of the processor on which -march=native depends."""
    cpu_info = Path("/proc/cpuinfo")
    if not cpu_info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = cpu_info.read_text().splitlines()
    return "\n".join(next((line for line in lines if line.startswith(start)), "") for start in _FIRST_CPU_LINES)
