"""The self-test of a jail: a probe attacks it once per process, before the first program runs."""

import functools
import json
import os
import socket
import tempfile
from pathlib import Path

from openmimo.runtime.sandbox import seccomp
from openmimo.runtime.sandbox.interpreter import find_interpreter
from openmimo.runtime.sandbox.jail import Jail
from openmimo.runtime.sandbox.records import JailError, SandboxLimits, SandboxUnavailableError
from openmimo.runtime.sandbox.tiers import TIERS, Tier
from openmimo.runtime.sandbox.workspace import Workspace

PROBE = Path(__file__).with_name("jailed_probe.py")
# The refused calls that are harmless if the filter fails.
MUST_BE_REFUSED = (
    "memfd_create", "shmget", "msgget", "mq_open", "io_uring_setup", "userfaultfd", "keyctl", "add_key", "pidfd_getfd",
    "process_vm_readv", "unshare", "setns", "mount", "bpf", "open_by_handle_at",
)  # fmt: skip
PROBE_LIMITS = SandboxLimits(processes=12, file_bytes=2**20)


@functools.cache
def why_not(name: str) -> str | None:
    """Return the reason why a tier fails on this machine; None if it passes. Cached per process."""
    tier = TIERS[name]
    if missing := tier.missing():
        return f"{missing} not installed"
    try:
        broken = _attack(tier)
    except (JailError, SandboxUnavailableError) as error:
        return str(error)
    return "; ".join(broken) or None


def _attack(tier: Tier) -> list[str]:
    """Run the probe in a jail, and return the attacks that succeeded."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as abstract,
        tempfile.TemporaryDirectory(prefix="openmimo-probe-") as folder,
        Workspace(lambda paths: Jail(tier, paths, PROBE_LIMITS), find_interpreter()) as workspace,
    ):
        abstract.bind(f"\0{Path(folder).name}")
        abstract.listen()
        secret = Path(folder, "secret")
        secret.write_text("secret")
        os.chmod(folder, 0o777)
        settings = {
            "isolates": tier.isolates,
            "port": listener.getsockname()[1],
            "abstract": Path(folder).name,
            "files": ["/etc/passwd", str(secret), __file__],
            "folders": ["/", "/usr", "/etc", "/dev", folder],
            "processes": PROBE_LIMITS.processes,
            "file_bytes": PROBE_LIMITS.file_bytes,
            "calls": seccomp.numbers(MUST_BE_REFUSED),
        }
        result = workspace.run(PROBE.read_text(), stdin=json.dumps(settings).encode())
    if not result.result:
        raise JailError(f"the self-test did not finish in the jail {tier.name!r}: {result.error_text[-500:]}")
    return json.loads(result.result)
