"""The system call filter, interpreted for both architectures, and system calls that honest programs need."""

import errno
import json
import struct
import subprocess
import sys

import pytest

from openmimo.runtime.sandbox import Sandbox, SandboxLimits, SandboxUnavailableError, seccomp
from openmimo.runtime.sandbox.selftest import why_not
from openmimo.runtime.sandbox.tiers import TIERS

ALLOWED = {"read": (0, 63), "openat": (257, 56), "execve": (59, 221), "futex": (202, 98), "wait4": (61, 260)}
FORK, THREAD = 17, 0x3D0F00  # SIGCHLD; the flags of pthread_create
OWN, HOST = 71, 70


def answer(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """Interprets the filter's classic BPF. Returns its error number, or 0 if it allows the call."""
    architecture = seccomp.ARCHITECTURES[machine]
    padded = [argument & 2**64 - 1 for argument in (*arguments, 0, 0, 0, 0, 0, 0)][:6]
    data = struct.pack("<iIQ6Q", number, architecture.audit if audit is None else audit, 0, *padded)
    names = dict(zip(seccomp.NAMES, (OWN, -OWN, HOST, -HOST), strict=True))
    place, held = 0, 0
    program = seccomp.program(machine)
    while True:
        code, yes, no, value = program[place]
        value = names.get(value, value) & 0xFFFFFFFF
        place += 1
        if code == seccomp.LOAD:
            (held,) = struct.unpack_from("<I", data, value)
        elif code == seccomp.AND:
            held &= value
        elif code == seccomp.EQUAL:
            place += yes if held == value else no
        elif code == seccomp.GREATER:
            place += yes if held > value else no
        else:
            return 0 if value == seccomp.ALLOW else value & 0xFFFF


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_every_refused_call_is_refused(machine):
    column = seccomp.ARCHITECTURES[machine].column
    numbers = [row[column] for row in (*seccomp.REFUSED.values(), *seccomp.JUDGED.values()) if row[column] is not None]
    assert len(set(numbers)) == len(numbers)
    for row in seccomp.REFUSED.values():
        if row[column] is not None:
            assert answer(machine, row[column]) == errno.EPERM
    for row in ALLOWED.values():
        assert answer(machine, row[column], 1, 2, 3) == 0
    assert len(seccomp.program(machine)) < 4096  # BPF_MAXINSNS


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_other_architectures_and_unknown_calls(machine):
    others = {architecture.audit for name, architecture in seccomp.ARCHITECTURES.items() if name != machine}
    for audit in (*others, 0x40000003, 0x40000028):  # 32-bit x86 and ARM on the same kernel
        assert answer(machine, 39, audit=audit) == errno.EPERM
    for number in (seccomp.LAST_KNOWN + 1, 0x40000000 + 39, -1):
        assert answer(machine, number) == errno.ENOSYS
    with pytest.raises(SandboxUnavailableError, match="x86_64 and aarch64, not riscv64"):
        seccomp.program("riscv64")


JUDGEMENTS = [
    ("clone", (FORK,), 0), ("clone", (THREAD,), 0), ("clone", (0x10000000 | FORK,), errno.EPERM),
    ("clone", (THREAD & ~0x400,), errno.EPERM), ("clone", (0x80 | FORK,), errno.EPERM), ("clone3", (), errno.ENOSYS),
    ("mmap", (0, 4096, 3, 0x22), 0), ("mmap", (0, 4096, 3, 0x01, 5), 0), ("mmap", (0, 4096, 3, 0x21), errno.EPERM),
    ("mmap", (0, 4096, 3, 0x40022), errno.EPERM),
    ("socket", (1, 1, 0), 0), ("socket", (2, 0x80001, 6), 0), ("socket", (10, 2, 17), 0),
    ("socket", (16, 3, 0), errno.EAFNOSUPPORT), ("socket", (40, 1, 0), errno.EAFNOSUPPORT),
    ("socket", (2, 1, 262), errno.EPROTONOSUPPORT), ("socketpair", (1, 1, 0), 0),
    ("setsockopt", (3, 1, 2), 0), ("setsockopt", (3, 6, 7), 0), ("setsockopt", (3, 1, 7), errno.EPERM),
    ("fcntl", (3, 2), 0), ("fcntl", (3, 8, OWN), errno.EPERM), ("ioctl", (0, 0x5401), 0),
    ("ioctl", (0, 0x5412), errno.EPERM), ("prlimit64", (0, 7), 0), ("prlimit64", (OWN, 0), errno.EPERM),
    ("kill", (99, 9), 0), ("kill", (0, 15), 0), ("kill", (OWN, 9), errno.EPERM), ("kill", (-OWN, 9), errno.EPERM),
    ("kill", (HOST, 0), errno.EPERM), ("kill", (-1, 9), errno.EPERM), ("kill", (2**32 + OWN, 9), errno.EPERM),
    ("tgkill", (99, 99, 6), 0), ("tgkill", (OWN, OWN, 9), errno.EPERM), ("pidfd_open", (OWN,), errno.EPERM),
]  # fmt: skip


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
@pytest.mark.parametrize(("name", "arguments", "expected"), JUDGEMENTS)
def test_calls_judged_by_their_arguments(machine, name, arguments, expected):
    number = seccomp.JUDGED[name][seccomp.ARCHITECTURES[machine].column]
    assert answer(machine, number, *arguments) == expected


@pytest.fixture(params=TIERS)
def everywhere(request):
    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return Sandbox(SandboxLimits(wall_seconds=30, processes=64), request.param, allow_unsafe=True)


HONEST = {
    "threads": "import threading\nt = threading.Thread(target=print, args=('done',)); t.start(); t.join()",
    "processes": "import subprocess\nprint(subprocess.run(['echo', 'done'], capture_output=True, text=True).stdout)",
    "a shell": "import os\nos.system('echo done | cat && (sleep 0 & wait)')",
    "multiprocessing": """
import multiprocessing as m
def square(n): return n * n
with m.get_context("fork").Pool(2) as pool: assert pool.map(square, range(9)) == [n * n for n in range(9)]
value, queue = m.Value("i", 3), m.Queue()
def put(): queue.put(value.value)
child = m.Process(target=put); child.start(); assert queue.get() == 3; child.join()
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=100); memory.buf[0] = 1; memory.close(); memory.unlink()
print("done")
""",
    "executors": """
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
for kind in (ProcessPoolExecutor, ThreadPoolExecutor):
    with kind(2) as pool: assert list(pool.map(abs, [-1, 2])) == [1, 2]
print("done")
""",
    "asyncio": """
import asyncio
async def main():
    child = await asyncio.create_subprocess_exec("echo", "done", stdout=asyncio.subprocess.PIPE)
    print((await child.communicate())[0].decode())
    await asyncio.gather(*(asyncio.sleep(0) for _ in range(9)))
asyncio.run(main())
""",
    "files and signals": """
import mmap, os, signal, tempfile
with tempfile.TemporaryFile() as file:
    file.write(bytes(9000)); file.flush()
    mmap.mmap(file.fileno(), 9000)[:4] = b"done"
    file.seek(0); print(file.read(4).decode())
signal.signal(signal.SIGUSR1, lambda *a: None); os.kill(os.getpid(), signal.SIGUSR1)
child = os.fork() or signal.pause(); os.kill(child, 9); os.wait()
assert open("/dev/zero", "rb").read(3) == bytes(3) and len(os.urandom(3)) == 3
open("/dev/null", "w").write("x"); os.cpu_count(); os.sched_getaffinity(0)
""",
}


@pytest.mark.parametrize("program", HONEST)
def test_honest_programs_run(everywhere, program):
    result = everywhere.run(HONEST[program])
    assert (result.exit_code, result.text.strip()) == (0, "done"), result.error_text


def test_numpy_runs_under_the_filter(tmp_path):
    """A jail does not show installed packages, so this test applies only the filter to a Python that has them."""
    numpy = pytest.importorskip("numpy")
    install = seccomp.__file__.replace("seccomp.py", "jailed_start.py")
    program = f"""
import sys
source = open({install!r}).read().rpartition("start()")[0]
import json
exec(compile(source, "jailed_start.py", "exec"))
install(json.loads(sys.stdin.read()))
import numpy as np
a = np.random.default_rng(0).normal(size=(300, 300))
print(abs(np.linalg.inv(a) @ a - np.eye(300)).max() < 1e-6, np.__version__)
"""
    code = json.dumps(seccomp.program())
    done = subprocess.run([sys.executable, "-c", program], input=code, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"True {numpy.__version__}\n", done.stderr
