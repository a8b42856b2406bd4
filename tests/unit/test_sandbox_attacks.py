"""Programs that attack the jail, its host or its judge, each in every kind of jail that holds on this machine."""

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from openmimo.runtime.sandbox import (
    CallTest,
    Sandbox,
    SandboxLimits,
    SandboxUnavailableError,
    StreamTest,
    WorkspaceError,
    grade,
    outcomes,
    watch,
)
from openmimo.runtime.sandbox.selftest import why_not
from openmimo.runtime.sandbox.tiers import TIERS

# Seconds for slow and busy machines, where filling the memory takes more than one. Tests that use them up set fewer.
LIMITS = SandboxLimits(
    cpu_seconds=15, wall_seconds=30, memory_bytes=256 * 2**20, processes=16, file_bytes=2**20, output_bytes=4096
)
SECONDS_TO_HANG = 60.0  # no program here runs longer than its wall limit


class Watched(Sandbox):
    """A sandbox that remembers its jails, to look for what they leave behind."""

    markers: tuple[str, ...] = ()

    def start(self, place):
        jail = super().start(place)
        self.markers += (jail.marker,)
        return jail

    def leftovers(self) -> list[str]:
        """Processes of its jails that still live."""
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
        """Waits a little: the kernel takes a moment to clear a namespace."""
        waited = time.monotonic() + 10
        while (left := self.leftovers()) and time.monotonic() < waited:
            time.sleep(0.02)
        assert not left


def holding(name: str):
    """A pytest parameter for a tier, skipped by its reason where it does not hold."""
    reason = why_not(name)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


JAILS = [holding(name) for name, tier in TIERS.items() if tier.isolates]


@pytest.fixture(params=JAILS)
def jail(request):
    """A sandbox of each kind. After the test nothing of it runs any more, and it did not hang."""
    started = time.monotonic()
    sandbox = Watched(LIMITS, request.param)
    yield sandbox
    sandbox.assert_nothing_is_left()
    assert time.monotonic() - started < SECONDS_TO_HANG


@pytest.fixture
def judge():
    """The best sandbox of this machine: what is told to a judge does not depend on how the jail is built."""
    try:
        sandbox = Watched(LIMITS)
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    yield sandbox
    sandbox.assert_nothing_is_left()


def with_limits(jail: Watched, **changes) -> Watched:
    """The same jail under other limits."""
    jail.limits = replace(LIMITS, **changes)
    return jail


# What it may use


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
    many = jail.run("import time\nfor n in range(9): open(str(n), 'wb').write(bytes(2**19))\ntime.sleep(99)")
    assert many.killed_by == "disk"


def test_folders_deeper_than_recursion_and_longer_than_paths(judge):
    with judge.workspace() as workspace:
        workspace.run("import os\nfor _ in range(1200):\n    os.mkdir('dddd')\n    os.chdir('dddd')")
        home = workspace.place.work.parent
    assert not home.exists()


def test_folders_that_cannot_be_counted_are_full(tmp_path):
    deep = tmp_path
    for _ in range(40):
        deep = deep / ("d" * 30)
    deep.mkdir(parents=True)
    assert watch.exceeds_disk(tmp_path, 2**30)
    assert not watch.exceeds_disk(tmp_path / "missing", 2**30)


# What it may reach


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
    bystander = os.fork()  # of the host: what kill(-1) would reach
    if bystander == 0:
        time.sleep(SECONDS_TO_HANG)
        os._exit(0)
    try:
        jail.run(killer.replace("PID", str(os.getpid())))
        assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
    finally:
        os.kill(bystander, signal.SIGKILL)
        os.waitpid(bystander, 0)


# What it leaves behind


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
        home = workspace.place.work.parent
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
    assert grade(judge, solution, SQUARES, function="square", test_seconds=2) == [False, True, True]


def test_tests_do_not_see_each_other(judge):
    solution = "seen = []\ndef square(n):\n    seen.append(n)\n    return n * n if len(seen) == 1 else -1"
    assert grade(judge, solution, SQUARES, function="square") == [True, True, True]


def test_an_orphan_of_a_test_does_not_hold_it_up(judge):
    solution = "import os, time\ndef square(n):\n    if os.fork() == 0: time.sleep(99)\n    return n * n"
    assert grade(judge, solution, SQUARES, function="square") == [True, True, True]


@pytest.mark.parametrize("cheat", ["print('PASS')", "import os; os._exit(0)", "while True: print(1)", "1/0", "exit(1)"])
def test_cheating_programs_pass_no_test(judge, cheat):
    assert grade(judge, cheat, [StreamTest("3\n", "9\n"), StreamTest("", "0")], test_seconds=0.3) == [False, False]
