"""Whether a jail holds on this machine: tried by attacking it, once per process, before anything else runs in it."""

import functools
import json
import os
import socket
import tempfile
from pathlib import Path

from openmimo.runtime.sandbox.interpreter import find_interpreter
from openmimo.runtime.sandbox.jail import Jail
from openmimo.runtime.sandbox.records import JailError, SandboxLimits, SandboxUnavailableError
from openmimo.runtime.sandbox.tiers import TIERS, Tier
from openmimo.runtime.sandbox.workspace import Workspace

PROBE = Path(__file__).with_name("jailed_probe.py")
PROBE_LIMITS = SandboxLimits(processes=12, file_bytes=2**20)


@functools.cache
def why_not(name: str) -> str | None:
    """Why the tier of that name does not hold here, or None if it does. Found out once per process."""
    tier = TIERS[name]
    if missing := tier.missing():
        return f"{missing} not installed"
    try:
        broken = _attack(tier)
    except (JailError, SandboxUnavailableError) as error:
        return str(error)
    return "; ".join(broken) or None


def _attack(tier: Tier) -> list[str]:
    """Runs the probe in a jail, and returns what it could do and should not."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        tempfile.TemporaryDirectory(prefix="openmimo-probe-") as folder,
        Workspace(lambda place: Jail(tier, place, PROBE_LIMITS), find_interpreter()) as workspace,
    ):
        secret = Path(folder, "secret")
        secret.write_text("secret")
        os.chmod(folder, 0o777)
        settings = {
            "port": listener.getsockname()[1],
            "files": ["/etc/passwd", str(secret)] if tier.isolates else [],
            "folders": ["/", "/usr", "/etc", "/dev", folder] if tier.isolates else [],
            "processes": PROBE_LIMITS.processes,
        }
        result = workspace.run(PROBE.read_text(), stdin=json.dumps(settings).encode())
    if not result.result:
        raise JailError(f"the self-test did not finish in the jail {tier.name!r}: {result.error_text[-500:]}")
    return json.loads(result.result) if tier.isolates else []
