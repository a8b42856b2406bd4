"""Programs that attack the jail, its host or its judge, in every kind of jail that works on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from openmimo.runtime.sandbox import (
    CallTest,
    Sandbox,
    SandboxLimits,
    SandboxResult,
    SandboxUnavailableError,
    StreamTest,
    WorkspaceError,
    cgroup,
    folders,
    grade,
    outcomes,
    seccomp,
    shown,
    watch,
)
from openmimo.runtime.sandbox.interpreter import find_interpreter
from openmimo.runtime.sandbox.selftest import why_not
from openmimo.runtime.sandbox.tiers import TIERS

# Seconds for slow and busy machines, where filling the memory takes more than one. Tests that use them up set fewer.
LIMITS = SandboxLimits(
    cpu_seconds=15, wall_seconds=30, memory_bytes=256 * 2**20, processes=16, file_bytes=2**20, output_bytes=4096
)
SECONDS_TO_HANG = 60.0  # above the wall limit of every program here


class Watched(Sandbox):
    """A sandbox that records its jails, so that tests can look for their processes."""

    markers: tuple[str, ...] = ()

    def start(self, place):
        jail = super().start(place)
        self.markers += (jail.marker,)
        return jail

    def leftovers(self) -> list[str]:
        """Returns the processes of its jails that are still alive."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes()
                if any(marker.encode() in environment for marker in self.markers):
                    found.append((process / "cmdline").read_text()[:80])
            except OSError:
                continue
        return found

    def assert_nothing_is_left(self):
        """Waits up to 10 seconds, because the kernel needs a moment to remove a namespace."""
        waited = time.monotonic() + 10
        while (left := self.leftovers()) and time.monotonic() < waited:
            time.sleep(0.02)
        assert not left


def holding(name: str):
    """A pytest parameter for a tier; if the tier does not work here, it is skipped with the reason."""
    reason = why_not(name)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


JAILS = [holding(name) for name, tier in TIERS.items() if tier.isolates]


@pytest.fixture(params=JAILS)
def jail(request):
    """A sandbox of each kind that isolates. After the test no process of it is left, and it did not hang."""
    started = time.monotonic()
    sandbox = Watched(LIMITS, request.param)
    yield sandbox
    sandbox.assert_nothing_is_left()
    assert time.monotonic() - started < SECONDS_TO_HANG


@pytest.fixture(params=[holding(name) for name in TIERS])
def everywhere(request):
    """A sandbox of each tier, including the one that does not isolate."""
    sandbox = Watched(LIMITS, request.param, allow_unsafe=True)
    yield sandbox
    sandbox.assert_nothing_is_left()


@pytest.fixture
def judge():
    """The best sandbox of this machine; a judge's result does not depend on the kind of jail."""
    try:
        sandbox = Watched(LIMITS)
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    yield sandbox
    sandbox.assert_nothing_is_left()


def with_limits(jail: Watched, **changes) -> Watched:
    """The same jail with other limits."""
    jail.limits = replace(LIMITS, **changes)
    return jail


# Resources


def test_fork_bomb(jail):
    bomb = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""
    result = with_limits(jail, wall_seconds=0.7).run(bomb)
    assert result.killed_by in ("wall", "cpu", "memory")


def test_number_of_processes(jail):
    counted = """
import os, time
count = 0
while count < 100:
    try: pid = os.fork()
    except OSError: break
    if pid == 0: time.sleep(99)
    count += 1
print(count)
"""
    result = jail.run(counted)
    assert 1 <= int(result.stdout) <= LIMITS.processes


def test_memory_bomb(jail):
    result = jail.run("held = []\nwhile True: held.append(bytearray(2**24))")
    assert result.exit_code != 0
    assert "MemoryError" in result.error_text or result.killed_by == "memory"


def test_memory_bomb_of_many_processes(jail):
    bomb = """
import os, time
for _ in range(8): os.fork() or (bytearray(b"x") * (80 * 2**20), time.sleep(99))
time.sleep(99)
"""
    assert jail.run(bomb).killed_by == "memory"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(jail, stream):
    result = jail.run(f"import sys\nwhile True: sys.{stream}.write('x' * 10_000)")
    assert result.killed_by == "output"
    assert result.truncated
    assert getattr(result, stream) == b"x" * LIMITS.output_bytes


def test_long_output_is_cut_and_the_program_goes_on(jail):
    result = jail.run("import sys\nprint('x' * 20_000)\nsys.exit(7)")
    assert (result.exit_code, result.truncated, result.killed_by) == (7, True, None)
    assert result.stdout == b"x" * LIMITS.output_bytes


def test_endless_loop(jail):
    result = with_limits(jail, cpu_seconds=1).run("while True: pass")
    assert result.killed_by == "cpu"
    assert not result.timed_out


def test_endless_loop_that_ignores_signals(jail):
    loop = "import signal\nfor n in (signal.SIGTERM, signal.SIGXCPU, signal.SIGINT): signal.signal(n, signal.SIG_IGN)\n"
    result = with_limits(jail, wall_seconds=0.7).run(loop + "while True: pass")
    assert result.killed_by in ("SIGKILL", "wall")


@pytest.mark.parametrize("program", ["import time\ntime.sleep(99)", ["sh", "-c", "trap '' TERM INT HUP; sleep 99"]])
def test_sleep_past_the_wall_limit(jail, program):
    result = with_limits(jail, wall_seconds=0.4).run(program)
    assert result.timed_out
    assert result.killed_by == "wall"


def test_sleep_with_its_pipes_closed(jail):
    result = with_limits(jail, wall_seconds=0.4).run("import os, time\nos.closerange(0, 99)\ntime.sleep(99)")
    assert result.timed_out


def test_stdin_that_is_never_read(jail):
    result = jail.run("print('done')", stdin=b"x" * 2**20)
    assert (result.exit_code, result.stdout) == (0, b"done\n")


def test_file_bombs(jail):
    one = jail.run("open('big', 'wb').write(bytes(2**22))")
    assert "File too large" in one.error_text
    temporary = jail.run("for n in range(9): open(f'/tmp/{n}', 'wb').write(bytes(2**19))")
    assert "No space left" in temporary.error_text
    many = jail.run("for n in range(9): open(str(n), 'wb').write(bytes(2**19))")
    assert "No space left" in many.error_text


def test_folders_deeper_than_recursion_and_longer_than_paths(judge):
    with judge.workspace() as workspace:
        workspace.run("import os\nfor _ in range(1200):\n    os.mkdir('dddd')\n    os.chdir('dddd')")
        home = workspace.paths.work.parent
    assert not home.exists()


def test_folders_that_cannot_be_counted_are_full(tmp_path):
    deep = tmp_path
    for _ in range(40):
        deep = deep / ("d" * 30)
    deep.mkdir(parents=True)
    assert watch.exceeds_disk(tmp_path, 2**30)
    assert not watch.exceeds_disk(tmp_path / "missing", 2**30)


# Memory and disk that do not belong to a process


@pytest.fixture(params=["control groups", "without control groups"])
def groups(request, monkeypatch):
    """With and without control groups, if this machine has them."""
    if request.param == "without control groups":
        monkeypatch.setattr(cgroup, "parents", dict)
    elif "memory" not in cgroup.parents():
        pytest.skip("no control group for memory can be made here")
    return request.param


HIDDEN_MEMORY = {
    "a memory file": "os.memfd_create('x')",
    "a SysV segment": "shared(libc.shmget(0, 2**24, 0o1600))",
    "a SysV message queue": "shared(libc.msgget(0, 0o1600))",
    "a POSIX message queue": "shared(libc.mq_open(b'/q', 0o102, 0o600, None))",
    "a secret memory file": "shared(libc.syscall(447, 0))",
    "shared memory without a file": "mmap.mmap(-1, 2**24)",
    "huge pages": "mmap.mmap(-1, 2**21, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)",
    "larger buffers of sockets": "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**24)",
    "watches of files": "shared(libc.inotify_init())",
    "pages spliced into pipes": "shared(libc.vmsplice(os.pipe()[1], None, 0, 0))",
}


def test_memory_that_no_process_shows_is_refused(everywhere):
    attempts = "\n".join(f"attempt(lambda: {way})" for way in HIDDEN_MEMORY.values())
    program = f"""
import ctypes, mmap, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def shared(descriptor):
    if descriptor < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def attempt(way):
    try: print("got", way())
    except OSError as error: print(error.strerror)
{attempts}
"""
    said = dict(zip(HIDDEN_MEMORY, everywhere.run(program).text.splitlines(), strict=True))
    assert set(said.values()) <= {"Operation not permitted", "Function not implemented"}, said


@pytest.mark.slow
def test_unread_bytes_in_sockets_count_as_memory(everywhere, groups):
    """Each of six processes fills 120 pairs of sockets: 300 MB that belong to no process."""
    program = """
import os, socket, time
def fill():
    held = [socket.socketpair() for _ in range(120)]
    for pair in held:
        for end in pair:
            end.setblocking(False)
            try:
                while True: end.send(bytes(2**16))
            except BlockingIOError: pass
    time.sleep(99)
for _ in range(6): os.fork() or fill()
time.sleep(99)
"""
    assert with_limits(everywhere, memory_bytes=128 * 2**20, processes=64).run(program).killed_by == "memory"


@pytest.mark.slow
def test_shared_pages_of_the_zero_device_count_as_memory(everywhere, groups):
    """Each round leaves one page mapped, with which the kernel keeps the other 64 MB."""
    program = """
import ctypes, mmap, os, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
zero = os.open("/dev/zero", os.O_RDWR)
for _ in range(8):
    place = libc.mmap(None, ctypes.c_size_t(2**26), 3, mmap.MAP_SHARED, zero, ctypes.c_long(0))
    ctypes.memset(place, 1, 2**26)
    libc.munmap(ctypes.c_void_p(place + 4096), ctypes.c_size_t(2**26 - 4096))
time.sleep(99)
"""
    assert everywhere.run(program).killed_by == "memory"


@pytest.mark.slow
def test_page_tables_count_as_memory(everywhere, groups):
    """Pages a gigabyte apart cost three pages of tables each."""
    program = """
import ctypes, os, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
def spread():
    for n in range(1, 16000):
        place = 2**40 + n * 2**30
        libc.mmap(ctypes.c_void_p(place), ctypes.c_size_t(4096), 3, 0x100022, -1, ctypes.c_long(0))
        ctypes.memset(place, 1, 1)
    time.sleep(99)
for _ in range(4): os.fork() or spread()
time.sleep(99)
"""
    assert everywhere.run(program).killed_by == "memory"


def test_deleted_files_that_are_open_count_as_disk(everywhere):
    program = """
import os, time
held = []
for n in range(200):
    held.append(open("x", "wb", buffering=0)); os.unlink("x")
    held[-1].write(bytes(2**19))
time.sleep(99)
"""
    result = everywhere.run(program)
    assert result.killed_by == "disk" or "No space left" in result.error_text


def test_deleted_files_that_are_mapped_count_as_disk(everywhere):
    program = """
import mmap, os, time
held = []
for n in range(200):
    with open("x", "w+b") as file:
        os.unlink("x"); file.truncate(2**19)
        held.append(mmap.mmap(file.fileno(), 2**19))
        held[-1].write(bytes(2**19))
time.sleep(99)
"""
    result = everywhere.run(program)
    assert result.killed_by in ("disk", "SIGBUS") or "No space left" in result.error_text


@pytest.mark.parametrize("folder", [".", "/tmp", "/dev/shm"])
def test_numbers_of_files(jail, folder):
    program = f"""
import os, time
os.chdir({folder!r})
for n in range(20_000): os.mkdir(str(n))
time.sleep(99)
"""
    result = jail.run(program)
    assert result.killed_by == "disk" or "No space left" in result.error_text


def test_sparse_files_do_not_fill_the_next_jail(jail):
    """Sparse files are larger than their folder; the next command gets them as sparse files."""
    with jail.workspace({"kept": "text"}) as workspace:
        workspace.run("for n in range(500): open(str(n), 'w').truncate(2**20)")
        counted = workspace.run("import os\nprint(len(os.listdir()), os.stat('7').st_size, os.stat('7').st_blocks)")
        assert counted.text == f"501 {2**20} 0\n"


def test_what_cannot_be_given_to_the_next_jail_is_an_error(jail):
    with jail.workspace() as workspace:
        workspace.run("import os\nfor _ in range(1200):\n    os.mkdir('dddd')\n    os.chdir('dddd')")
        with pytest.raises(WorkspaceError, match="cannot be copied into a new jail"):
            workspace.run("print(1)")


# Access


def test_the_program_cannot_do_without_the_filter(everywhere):
    """The supervisor and its parents run under the filter, and processes that they start inherit it."""
    program = """
import ctypes, os, subprocess
for path in ("environ", "mem", "fd/0", "cwd/x"):
    try: print("opened", os.open(f"/proc/{os.getppid()}/{path}", os.O_RDWR))
    except OSError: pass
status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
print([line for line in status.splitlines() if line.startswith(("NoNewPrivs", "Seccomp:"))])
"""
    assert everywhere.run(program).text == "['NoNewPrivs:\\t1', 'Seccomp:\\t2']\n"


def test_socket_families_without_a_namespace(everywhere):
    program = """
import socket
for family, kind, protocol in ((40, 1, 0), (16, 3, 0), (38, 5, 0), (17, 3, 0), (2, 1, 132), (2, 1, 262), (31, 1, 0)):
    try: print("opened", socket.socket(family, kind, protocol))
    except OSError as error: print(error.strerror)
"""
    said = everywhere.run(program).text.splitlines()
    assert said == ["Address family not supported by protocol"] * 4 + ["Protocol not supported"] * 2 + said[:1]


def test_kernel_interfaces_that_nothing_needs(everywhere):
    refused = seccomp.numbers(name for name, row in seccomp.REFUSED.items() if None not in row and name != "reboot")
    program = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {refused}.items():
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != errno.EPERM: print(name)
for number in (435, 463, 10_000, 0x40000000 + 39):
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != errno.ENOSYS: print(number)
for flags in (0x10000000, 0x20000000, 0x00020000, 0x40000000):
    if libc.syscall({seccomp.JUDGED["clone"][seccomp.ARCHITECTURES[os.uname().machine].column]}, flags | 17) >= 0:
        print("clone", flags)
"""
    result = everywhere.run(program)
    assert (result.exit_code, result.stdout) == (0, b"")


def test_signals_to_the_supervisor_and_to_everybody(everywhere):
    """Includes signals that a resource limit or a file descriptor sends."""
    program = """
import fcntl, os, resource, signal
above = os.getppid()
for attempt in (
    lambda: os.kill(above, 9), lambda: os.kill(-1, 0), lambda: os.killpg(above, 9), lambda: os.kill(above, 19),
    lambda: signal.pidfd_send_signal(os.pidfd_open(above), 9),
    lambda: resource.prlimit(above, resource.RLIMIT_CPU, (0, 0)),
    lambda: fcntl.fcntl(0, fcntl.F_SETOWN, above), lambda: fcntl.fcntl(0, fcntl.F_SETSIG, 9),
):
    try: print("sent", attempt())
    except OSError: pass
os.kill(os.getpid(), 0)
os.kill(0, 0)
print("alive")
"""
    assert everywhere.run(program).stdout == b"alive\n"


def test_packages_of_the_system_are_not_shown(jail):
    program = """
import glob, os, sys
packages = [path for pattern in ("site-packages", "dist-packages") for root in ("/usr", sys.prefix)
            for path in glob.glob(f"{root}/lib*/python*/{pattern}")]
print([path for path in packages if os.listdir(path)], os.path.exists("/usr/local/etc"), os.listdir("/etc"))
for name in ("cmdline", "kallsyms", "keys", "modules", "kcore"):
    try: print(open(f"/proc/{name}").read(10))
    except OSError: pass
"""
    shown = jail.run(program).text.splitlines()
    assert shown[0].startswith("[] False")
    assert not any(shown[1:])


def test_a_package_installed_for_the_system_is_hidden(tmp_path, monkeypatch):
    """Covers a package outside the usual folders."""
    monkeypatch.setattr(shown, "OWN_PACKAGE", Path("/usr/lib/python3"))
    what = shown.what_is_shown(find_interpreter())
    assert "/usr/lib/python3" in what.hidden or not Path("/usr/lib/python3").is_dir()


def test_network(jail):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        port = listener.getsockname()[1]
        abstract.bind(f"\0openmimo-test-{port}")
        abstract.listen()
        attempts = f"""
import socket
for attempt in (
    lambda: socket.create_connection(("1.1.1.1", 53), timeout=1),
    lambda: socket.create_connection(("127.0.0.1", {port}), timeout=1),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53)),
    lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b"x", ("2001:4860:4860::8888", 53)),
    lambda: socket.socket(socket.AF_UNIX).connect("\\0openmimo-test-{port}"),
    lambda: socket.getaddrinfo("example.com", 80),
):
    try: print("reached", attempt())
    except OSError: print("refused")
"""
        assert jail.run(attempts).text.split() == ["refused"] * 6


def test_host_files_cannot_be_read(jail, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == Path.home().owner() and folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    paths = [
        secret,
        tmp_path,
        tmp_path.parent,
        "/etc/passwd",
        "/etc/shadow",
        "/root",
        Path.home(),
        Path.cwd(),
        __file__,
    ]
    reader = f"""
import os
for path in {[str(path) for path in paths]}:
    try: print(os.listdir(path) if os.path.isdir(path) else open(path).read(), path)
    except OSError: pass
for name in os.listdir("/proc"):
    for link in ("root", "cwd", "fd/3", "environ"):
        try:
            if name.isdigit() and os.path.exists(f"/proc/{{name}}/{{link}}{secret}"): print("reached")
        except OSError: pass
"""
    result = jail.run(reader)
    assert (result.exit_code, result.stdout) == (0, b"")


def test_the_environment_is_empty_of_the_host(jail, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    result = jail.run("import os\nprint(dict(os.environ))\nprint(open('/proc/1/environ').read())")
    assert "hunter2" not in result.text + result.error_text


def test_writing_outside(jail, tmp_path):
    tmp_path.chmod(0o777)
    writer = f"""
import os
for folder in ["/", "/usr", "/usr/bin", "/etc", "/dev", "/proc", "/proc/sys/kernel", "/home", {str(tmp_path)!r}]:
    for attempt in (lambda: open(folder + "/new", "w").write("x"), lambda: os.mkdir(folder + "/folder")):
        try: attempt(); print("wrote in", folder)
        except OSError: pass
for path in ("/usr/bin/python3", "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/bin/sh"):
    try: open(path, "a"); print("opened", path)
    except OSError: pass
"""
    assert jail.run(writer).stdout == b""
    assert not list(tmp_path.iterdir())


def test_new_privileges(jail):
    attempts = [
        ["unshare", "--user", "--map-root-user", "echo", "gained"],
        ["mount", "-t", "tmpfs", "none", "/tmp"],
        ["mount", "-o", "remount,rw", "/usr"],
        ["chroot", "/", "echo", "gained"],
        ["su", "-c", "echo gained"],
        ["mknod", "disk", "b", "254", "0"],
    ]
    program = f"""
import subprocess
for argv in {attempts}:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    print(done.returncode != 0, "gained" in done.stdout)
"""
    assert jail.run(program).text == "True False\n" * len(attempts)


def test_killing_the_parent_and_everybody(jail):
    killer = (
        "import os, signal\nfor pid in (os.getppid(), PID, 1, -1):\n    try: os.kill(pid, 9)\n    except OSError: pass"
    )
    bystander = os.fork()  # a process of the host, which kill(-1) would reach
    if bystander == 0:
        time.sleep(SECONDS_TO_HANG)
        os._exit(0)
    try:
        jail.run(killer.replace("PID", str(os.getpid())))
        assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
    finally:
        os.kill(bystander, signal.SIGKILL)
        os.waitpid(bystander, 0)


# Processes and files that are left


def test_orphans_that_keep_the_pipes_open_end_with_the_program(jail):
    orphan = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(99)\nprint('done')"
    result = jail.run(orphan)
    assert (result.exit_code, result.stdout, result.timed_out) == (0, b"done\n", False)


def test_background_commands_end_with_the_command(jail):
    token = f"99.{os.getpid()}"
    result = jail.run(["sh", "-c", f"env -i setsid nohup sleep {token} & echo started"])
    assert result.stdout == b"started\n"

    def living():
        return [path for path in Path("/proc").glob("[0-9]*/cmdline") if token in _text(path)]

    waited = time.monotonic() + 10
    while living() and time.monotonic() < waited:
        time.sleep(0.02)
    assert not living()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_daemons_end_with_the_program(everywhere):
    """After two forks, a new session, an empty environment and closed files, only their ancestors identify them."""
    token = f"97.{os.getpid()}"
    program = f"""
import os, signal
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.closerange(0, 99)
            os.execve("/usr/bin/env", ["env", "-i", "sleep", "{token}"], {{}})
        os._exit(0)
    os.wait()
print("done")
"""
    for ending in ("", "import time\ntime.sleep(99)", "os.kill(os.getpid(), 9)"):
        with_limits(everywhere, wall_seconds=0.8).run(program + ending)
        waited = time.monotonic() + 10
        while (left := [path for path in Path("/proc").glob("[0-9]*/cmdline") if token in _text(path)]) and (
            time.monotonic() < waited
        ):
            time.sleep(0.02)
        assert not left


@pytest.fixture
def open_folder():
    """An empty folder that every user can read, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        yield Path(folder)


def test_folders_of_a_killed_host_are_swept(open_folder, monkeypatch):
    host = """
import os
from openmimo.runtime.sandbox import Sandbox
workspace = Sandbox(allow_unsafe=True).workspace({"a": "b"})
workspace.start()
print(workspace.paths.work.parent, flush=True)
os.kill(os.getpid(), 9)
"""
    monkeypatch.setenv("TMPDIR", str(open_folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    left = Path(subprocess.run([sys.executable, "-c", host], stdout=subprocess.PIPE, text=True).stdout.strip())
    assert left.exists() and left.parent == open_folder
    with Sandbox(LIMITS, allow_unsafe=True).workspace() as living:
        assert not left.exists()
        folders.sweep()
        assert living.paths.work.exists()
        assert not any(parent.folder.joinpath(left.name).exists() for parent in cgroup.parents().values())
    (open_folder / "openmimo-jail-link").symlink_to(open_folder)
    folders.sweep()
    assert open_folder.exists()


# The working folder, seen from the host


def test_links_and_pipes_in_the_working_folder_lead_nowhere(jail, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with jail.workspace({"plain": "text", "folder/plain": "text"}) as workspace:
        workspace.run(["ln", "-s", str(secret), "link"])
        workspace.run(["ln", "-s", str(tmp_path), "linked"])
        workspace.run(["mkfifo", "pipe"])
        workspace.run(["sh", "-c", "rm -r folder; ln -s / folder"])
        for path in ("link", "linked/secret", "pipe", "folder/etc/passwd", "missing", "../root", "a/../../b", "", "."):
            with pytest.raises(WorkspaceError):
                workspace.read(path)
        for path in ("link", "linked/new", "pipe", "folder/tmp/new", "/etc/new", "../new", "plain/new", "linked"):
            with pytest.raises(WorkspaceError):
                workspace.write(path, "changed")
        assert workspace.read("plain") == b"text"
    assert secret.read_text() == "secret"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_working_folder_without_permissions_is_removed(jail):
    with jail.workspace() as workspace:
        workspace.run(["sh", "-c", "mkdir -p a/b; touch a/b/c; chmod 0 a/b a"])
        home = workspace.paths.work.parent
    assert not home.exists()


def test_a_module_in_the_working_folder_does_not_replace_the_jails_own(jail):
    with jail.workspace({"json.py": "print('mine')", "os.py": "print('mine')"}) as workspace:
        result = workspace.run("print('program')")
        assert (result.exit_code, result.stdout) == (0, b"program\n")


# The judge

SQUARES = [CallTest([n], n * n) for n in (2, 3, 5)]
NONE_PASSED = [False, False, False]

CHEATS = {
    "leaves before the asserts": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves in the call": "def square(n):\n    import os\n    os._exit(0)",
    "leaves in the call, politely": "def square(n):\n    raise SystemExit(0)",
    "equals everything": """
class Chameleon(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __index__(self): return self
    def __int__(self): return self
def square(n): return Chameleon(-1)
""",
    "is an object that equals everything": """
class Chameleon:
    def __eq__(self, other): return True
def square(n): return Chameleon()
""",
    "patches builtins": """
import builtins
builtins.all = builtins.any = lambda *a: True
builtins.map = lambda *a: [True]
builtins.len = lambda *a: 1
builtins.isinstance = lambda *a: True
def square(n): return -1
""",
    "patches modules": """
import json, sys, math
json.dump = lambda answer, pipe: pipe.write('{"value": true, "passed": true}')
math.isclose = lambda *a, **k: True
for name in list(sys.modules): sys.modules[name] = None
def square(n): return -1
""",
    "prints PASS": """
import sys
def square(n):
    print("PASS"); print("OK 3 passed", file=sys.stderr)
    return -1
""",
    "writes into every open file": """
import os
for fd in range(3, 64):
    for text in (b"R", b"PASS\\n", b'{"number": 0, "passed": true, "written": "true", "status": 0}\\n'):
        try: os.write(fd, text)
        except OSError: pass
def square(n): return -1
""",
    "writes into its parent's files": """
import os
line = b'\\n'.join(b'{"number": %d, "passed": true, "written": "{}", "status": 0}' % n for n in range(3)) + b'\\n'
for pid in [os.getppid(), 1]:
    for fd in range(64):
        try: os.write(os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK), line)
        except OSError: pass
def square(n): return -1
""",
    "kills its judge": "import os\ndef square(n):\n    os.kill(os.getppid(), 9)\n    return -1",
    "kills everybody": "import os\ndef square(n):\n    os.kill(-1, 9)\n    return -1",
    "returns something huge": "def square(n): return 'x' * 10**7",
    "returns something deep": """
def square(n):
    value = []
    for _ in range(100_000): value = [value]
    return value
""",
    "returns itself": "def square(n):\n    value = []\n    value.append(value)\n    return value",
    "never returns": "def square(n):\n    while True: pass",
    "does not compile": "def square(n) return n",
    "has no such function": "def cube(n): return n ** 3",
    "recurses": "def square(n): return square(n)",
    "crashes": "import ctypes\ndef square(n): return ctypes.string_at(0)",
    "compares nothing": "def square(n): return float('nan')",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_pass_no_test(judge, cheat):
    assert grade(judge, CHEATS[cheat], SQUARES, function="square", test_seconds=0.2) == NONE_PASSED


def test_expected_values_are_nowhere_in_the_jail(judge):
    spy = """
import gc, os, sys
def square(n):
    seen = [str(item) for item in gc.get_objects() if isinstance(item, (list, dict, tuple))] + [str(sys.argv)]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ"):
            try: seen.append(open(f"/proc/{pid}/{name}", errors="replace").read())
            except OSError: pass
    try: # all of the memory of the process that gives the tests
        for line in open(f"/proc/{os.getppid()}/maps"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            with open(f"/proc/{os.getppid()}/mem", "rb") as memory:
                memory.seek(start)
                seen.append(memory.read(end - start).decode("latin-1"))
    except (OSError, ValueError, OverflowError): pass
    text = "".join(seen)
    return ["marker-of-the-inputs" in text, "marker-of-the-" + "SREWSNA".lower()[::-1] in text]
"""
    test = CallTest(["marker-of-the-inputs"], "marker-of-the-answers")
    (outcome,) = outcomes(judge, spy, [test], function="square", test_seconds=20)
    assert outcome.reason == "returned [True, False]"


def test_one_crash_does_not_lose_the_other_tests(judge):
    solution = """
import os
def square(n):
    if n == 3: os.abort()
    return n * n
"""
    assert grade(judge, solution, SQUARES, function="square") == [True, False, True]


def test_one_endless_test_does_not_lose_the_others(judge):
    solution = "import time\ndef square(n):\n    if n == 2: time.sleep(99)\n    return n * n"
    assert grade(judge, solution, SQUARES, function="square", test_seconds=1) == [False, True, True]


def test_tests_do_not_see_each_other(judge):
    solution = "seen = []\ndef square(n):\n    seen.append(n)\n    return n * n if len(seen) == 1 else -1"
    assert grade(judge, solution, SQUARES, function="square") == [True, True, True]


def test_an_orphan_of_a_test_does_not_hold_it_up(judge):
    solution = "import os, time\ndef square(n):\n    if os.fork() == 0: time.sleep(99)\n    return n * n"
    assert grade(judge, solution, SQUARES, function="square") == [True, True, True]


@pytest.mark.parametrize("cheat", ["print('PASS')", "import os; os._exit(0)", "while True: print(1)", "1/0", "exit(1)"])
def test_cheating_programs_pass_no_test(judge, cheat):
    assert grade(judge, cheat, [StreamTest("3\n", "9\n"), StreamTest("", "0")], test_seconds=0.3) == [False, False]


FORGED = """
import ctypes, os, sys
line = {line}
for pid in (os.getppid(), 1):
    try: handle = os.pidfd_open(pid)
    except OSError: continue
    for number in range(64):
        copied = ctypes.CDLL(None).syscall(438, handle, number, 0)
        for fd in ([copied] if copied >= 0 else []):
            try: os.write(fd, line)
            except OSError: pass
    for number in range(64):
        try: os.write(os.open(f"/proc/{{pid}}/fd/{{number}}", os.O_WRONLY | os.O_NONBLOCK), line)
        except OSError: pass
def square(n): return -1
"""


def test_the_result_channel_cannot_be_taken(judge):
    """A forged report would pass every test: the solution here knows the answers of its tests."""
    reports = [{"number": number, "written": '{"value": 4}', "status": 0} for number in range(3)]
    line = "".join("\n" + json.dumps(report) for report in reports).encode() + b"\n"
    tests = [CallTest([n], 4) for n in range(3)]
    assert grade(judge, FORGED.format(line=line), tests, function="square") == NONE_PASSED


class Forger:
    """A runner whose program has written its own results."""

    limits = LIMITS

    def __init__(self, *written):
        lines = [json.dumps({"number": number, "written": text, "status": 0}) for number, text in enumerate(written)]
        self._result = "\n".join(lines).encode()

    def run(self, program, files=None, stdin=b""):
        return SandboxResult(0, b"", b"", False, False, None, 0.0, self._result)


COLLIDING = [{"int": hex(n * (2**61 - 1))} for n in range(20_000)]
COSTLY = {
    "a set of integers of one hash": {"set": COLLIDING},
    "keys of one hash": {"dict": [[key, 0] for key in COLLIDING]},
    "tuples of one hash": {"set": [{"tuple": [key]} for key in COLLIDING]},
    "floats of one hash": {"set": [float(n * (2**61 - 1)) for n in range(20_000)]},
    "many lists": [[[]]] * 20_000,
    "a long integer": {"int": "0x" + "f" * 500_000},
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_forged_value_costs_the_host_little(kind):
    """Measured in processor seconds, at limits far above what an honest value needs."""
    forger = Forger(json.dumps({"value": COSTLY[kind]}))
    forger.limits = SandboxLimits(output_bytes=2**24)
    started = time.process_time()
    for expected in ({1, 2}, set(range(20_000)), {n: 0 for n in range(20_000)}, [[]] * 20_000):
        assert not outcomes(forger, "", [CallTest([], expected)], function="f")[0].passed
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "written",
    [
        '{"value": {"set": 5}}',
        '{"value": {"dict": [1]}}', '{"value": {"dict": [[1, 2, 3]]}}', '{"value": {"int": 4}}',
        '{"value": {"int": "0xg"}}', '{"value": {"bytes": "zz"}}', '{"value": {"x": 1, "y": 2}}', '{"value": {}}', "[]",
        '"error"', "5", "{", '{"value": {"set": [[1]]}}', '{"value": ' + "[" * 2000, "9" * 4000, '{"value": 1e999}',
        '{"value": {"tuple": {"set": []}}}', '{"value": {"set": [{"dict": []}]}}',
    ],
)  # fmt: skip
def test_forged_values_pass_nothing_and_break_nothing(written):
    for expected in ({1}, {1: 2}, 4, b"", [1], (), None, "x"):
        assert not outcomes(Forger(written), "", [CallTest([], expected)], function="f")[0].passed


def test_a_forged_report_longer_than_any_is_left_out():
    long = '{"value": [' + "1," * LIMITS.output_bytes + "1]}"
    assert "not reached" in outcomes(Forger(long), "", [CallTest([], 1)], function="f")[0].reason
