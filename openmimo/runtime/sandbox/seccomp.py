"""A seccomp filter of the system calls that a jailed program may not make, as a classic BPF program.

The filter answers a refused call with an error number, so that Python raises OSError and a C library falls back. It
covers what namespaces and resource limits leave open: memory that belongs to no process, kernel interfaces with a
history of faults, socket families without a namespace, and signals to the supervisor. Numbers are from the Linux tables
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; the layout is `struct seccomp_data`.
"""

import errno
import platform
from collections.abc import Iterable
from dataclasses import dataclass

from openmimo.runtime.sandbox.records import SandboxUnavailableError

# One instruction of classic BPF: code, jump if true, jump if false, constant. A constant may be a name from NAMES,
# which the process in the jail replaces by its number.
Instruction = tuple[int, int, int, int | str]
NAMES = ("supervisor", "supervisor's group", "host", "host's group")

LOAD, AND, EQUAL, GREATER, RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
LAST_KNOWN = 462  # newer calls, and those of the x32 ABI, are answered as by an older kernel

AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
PROTOCOLS = (0, 1, 6, 17)  # the default, ICMP (and the number of AF_UNIX), TCP, UDP
NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} and CLONE_NEWTIME
CLONE_FILES, CLONE_THREAD = 0x400, 0x10000
MAP_SHARED, MAP_TYPE, MAP_ANONYMOUS, MAP_HUGETLB = 0x01, 0x0F, 0x20, 0x40000
SOL_SOCKET, BUFFER_OPTIONS = 1, (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF and their forced kinds
SIGNAL_COMMANDS = (8, 10, 15)  # fcntl F_SETOWN, F_SETSIG, F_SETOWN_EX: a signal to a process of one's choice
SIGNAL_REQUESTS = (0x8901, 0x8902, 0x5412, 0x541C)  # ioctl FIOSETOWN, SIOCSPGRP, TIOCSTI, TIOCLINUX

# name: (x86_64, aarch64); None where the architecture has no such call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # memory that no process has mapped, so that accounting by process misses it
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75), "io_setup": (206, 0),
    "shmget": (29, 194), "shmctl": (31, 195), "shmat": (30, 196), "shmdt": (67, 197),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgctl": (71, 187), "msgsnd": (69, 189), "msgrcv": (70, 188), "mq_open": (240, 180),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    # kernel interfaces that nothing in a jail needs
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116), "acct": (163, 89),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "swapon": (167, 224), "swapoff": (168, 225),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "uselib": (134, None), "lookup_dcookie": (212, 18),
    # access to other processes, their memory and their descriptors
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    # namespaces, mounts, and access to files that bypasses them
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "statmount": (457, 457), "listmount": (458, 458), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
}  # fmt: skip

# Calls that are harmful with some arguments only: see `_argument_rules`.
JUDGED = {
    "clone": (56, 220), "clone3": (435, 435), "mmap": (9, 222), "socket": (41, 198), "socketpair": (53, 199),
    "setsockopt": (54, 208), "fcntl": (72, 25), "ioctl": (16, 29), "prlimit64": (302, 261), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """The number of an architecture in seccomp_data, and its column in the tables above."""

    audit: int
    column: int


ARCHITECTURES = {"x86_64": Architecture(0xC000003E, 0), "aarch64": Architecture(0xC00000B7, 1)}


def program(machine: str | None = None) -> list[Instruction]:
    """Return the filter for a machine (default: this one), which `jailed_start.py` installs.

    Raises:
        SandboxUnavailableError: There is no table for the architecture.
    """
    architecture = _architecture(machine or platform.machine())
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, architecture.audit),
        _answer(errno.EPERM),
        (LOAD, 0, 0, NUMBER_AT),
        (GREATER, 0, 1, LAST_KNOWN),
        _answer(errno.ENOSYS),
    ]
    for row in REFUSED.values():
        if (number := row[architecture.column]) is not None:
            code += _block(number, [_answer(errno.EPERM)])
    for name, rules in _argument_rules().items():
        code += _block(JUDGED[name][architecture.column], rules)
    return [*code, (RETURN, 0, 0, ALLOW)]


def numbers(names: Iterable[str]) -> dict[str, int]:
    """Return the numbers of refused calls on this machine, by name. Calls that the architecture lacks are omitted."""
    column = _architecture(platform.machine()).column
    return {name: number for name in names if (number := REFUSED[name][column]) is not None}


def _architecture(machine: str) -> Architecture:
    if machine not in ARCHITECTURES:
        raise SandboxUnavailableError(
            f"The sandbox's system call filter supports {' and '.join(ARCHITECTURES)}, not {machine}."
        )
    return ARCHITECTURES[machine]


def _argument_rules() -> dict[str, list[Instruction]]:
    """Return, for each call in JUDGED, instructions that end in an answer."""
    allow: Instruction = (RETURN, 0, 0, ALLOW)
    no_signal = [*_refuse(0, (*NAMES, 0xFFFFFFFF)), allow]
    families = [*_refuse_others(0, (AF_UNIX, AF_INET, AF_INET6), errno.EAFNOSUPPORT)]
    protocols = [*_refuse_others(2, PROTOCOLS, errno.EPROTONOSUPPORT)]
    return {
        # a thread with separate descriptors would hide them from /proc/PID/fd of the process
        "clone": [
            *_refuse_any_of(0, NEW_NAMESPACES),
            *_refuse_masked(0, CLONE_THREAD | CLONE_FILES, CLONE_THREAD),
            allow,
        ],
        "clone3": [_answer(errno.ENOSYS)],
        # pages of shared anonymous memory persist when all but one of them are unmapped
        "mmap": [
            *_refuse_masked(3, MAP_TYPE | MAP_ANONYMOUS, MAP_SHARED | MAP_ANONYMOUS),
            *_refuse_any_of(3, MAP_HUGETLB),
            allow,
        ],
        "socket": [*families, *protocols, allow],
        "socketpair": [*families, *protocols, allow],
        "setsockopt": [_load(1), (EQUAL, 1, 0, SOL_SOCKET), allow, *_refuse(2, BUFFER_OPTIONS), allow],
        "fcntl": [*_refuse(1, SIGNAL_COMMANDS), allow],
        "ioctl": [*_refuse(1, SIGNAL_REQUESTS), allow],
        "prlimit64": [*_refuse_others(0, (0,), errno.EPERM), allow],
        **{name: no_signal for name in ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")},
        "pidfd_open": no_signal,
    }


def _answer(error: int) -> Instruction:
    return (RETURN, 0, 0, REFUSE | error)


def _load(argument: int) -> Instruction:
    """Load the low 32 bits of an argument; these calls use no more."""
    return (LOAD, 0, 0, ARGUMENTS_AT + 8 * argument)


def _block(number: int, body: list[Instruction]) -> list[Instruction]:
    """Apply `body` to calls of that number. It must always answer, because later blocks need the accumulator."""
    assert body[-1][0] == RETURN and len(body) < 256
    return [(EQUAL, 0, len(body), number), *body]


def _refuse(argument: int, values: Iterable[int | str]) -> list[Instruction]:
    """Answer EPERM if the argument is one of `values`."""
    code = [_load(argument)]
    for value in values:
        code += [(EQUAL, 0, 1, value), _answer(errno.EPERM)]
    return code


def _refuse_others(argument: int, values: tuple[int, ...], error: int) -> list[Instruction]:
    """Answer an error if the argument is not one of `values`."""
    tests = [(EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [_load(argument), *tests, _answer(error)]


def _refuse_masked(argument: int, mask: int, value: int) -> list[Instruction]:
    """Answer EPERM if the bits of `mask` equal `value`."""
    return [_load(argument), (AND, 0, 0, mask), (EQUAL, 0, 1, value), _answer(errno.EPERM)]


def _refuse_any_of(argument: int, mask: int) -> list[Instruction]:
    """Answer EPERM if any bit of `mask` is set."""
    return [_load(argument), (AND, 0, 0, mask), (EQUAL, 1, 0, 0), _answer(errno.EPERM)]
