"""The C kernels of this folder, compiled on this machine the first time that one is wanted.

`library()` gives the loaded library, or None where there is no working C compiler; every operation then falls back to
torch. The file it builds lies under `$OPENMIMO_CACHE` (else `~/.cache/openmimo`) in `native/`, named after all that
went into it: sources, compiler, flags and processor. `$CC` names another compiler; `OPENMIMO_NATIVE=0` turns it off.
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

import torch  # first, so that its OpenMP runtime is the one that the library finds

from openmimo.core.files import cache_folder

DTYPES = (torch.float32, torch.bfloat16)  # what the kernels compute

SOURCES = Path(__file__).parent
# No -ffast-math: the kernels say themselves in which order they add, and it is part of what they promise.
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Tried in turn: not every compiler has OpenMP, or knows its own processor.
_ATTEMPTS = (("-march=native", "-fopenmp"), ("-march=native",), ())
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 300
_FIRST_CPU_LINES = ("model name", "flags", "Features", "CPU part")


class BuildError(Exception):
    """Why there is no library."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are turned off or cannot be built (which is said once, as a warning)."""
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
    """A function of the library that takes packed structs and returns an int (0: it succeeded) or nothing.

    A kernel calls `function.call(function.pack(...))`. Looking the function up is left to the first call, because it
    may compile the library.

    Args:
        name: Its name in the C sources.
        layout: The fields of its struct, in the letters of the module `struct`.
        num_arguments: How many packed structs it takes; `layout` is that of the first.
    """

    def __init__(self, name: str, layout: str, *, num_arguments: int = 1):
        self.pack = struct.Struct(layout).pack
        self._name, self._num_arguments = name, num_arguments

    @functools.cached_property
    def call(self) -> Callable[..., int]:
        """The C function. The library must be there: `refuse` says whether it is."""
        function = library()[self._name]
        function.argtypes, function.restype = (ctypes.c_char_p,) * self._num_arguments, ctypes.c_int
        return function


class Need(Protocol):
    """What the needs of all operations with C kernels state."""

    @property
    def on_cpu(self) -> bool:
        """Whether the tensors lie in the memory of the CPU."""

    @property
    def needs_gradients(self) -> bool:
        """Whether autograd records the call."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""


def refuse(need: Need) -> str | None:
    """The reason why no C kernel serves a need, or None."""
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
    """The command of $CC, or of the first compiler that is installed. Raises BuildError if there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    found = next((path for path in map(shutil.which, _COMPILERS) if path), None)
    if found is None:
        raise BuildError(f"there is no C compiler ({', '.join(_COMPILERS)})")
    return [found]


def build(compiler: list[str]) -> Path:
    """Compiles the folder with `compiler`, unless that has been done before, and gives the library's path.

    Several processes may do so at once: each writes a file of its own and moves it into place. Raises OSError or
    SubprocessError if the compiler does not run, BuildError with its last line if it does not compile.
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
    """Where libraries are kept; all in it can be built again."""
    return cache_folder() / "native"


def _fingerprint(compiler: list[str], version: str) -> str:
    """A name for what this compiler makes of these sources on this processor."""
    digest = hashlib.sha256(repr((compiler, version, _FLAGS, _ATTEMPTS, _processor())).encode())
    for path in _files("*.[ch]"):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _files(pattern: str) -> list[Path]:
    return sorted(SOURCES.glob(pattern))


def _processor() -> str:
    """What -march=native depends on."""
    cpu_info = Path("/proc/cpuinfo")
    if not cpu_info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = cpu_info.read_text().splitlines()
    return "\n".join(next((line for line in lines if line.startswith(start)), "") for start in _FIRST_CPU_LINES)
