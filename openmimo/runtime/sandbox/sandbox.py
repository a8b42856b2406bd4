"""Runs untrusted programs in the best jail of this machine, or refuses."""

import asyncio
from collections.abc import Mapping

from openmimo.core.errors import ConfigError
from openmimo.runtime.sandbox import cgroup, folders
from openmimo.runtime.sandbox.interpreter import find_interpreter
from openmimo.runtime.sandbox.jail import Jail
from openmimo.runtime.sandbox.records import SandboxLimits, SandboxResult, SandboxUnavailableError
from openmimo.runtime.sandbox.selftest import why_not
from openmimo.runtime.sandbox.tiers import TIERS, JailPaths, Tier
from openmimo.runtime.sandbox.workspace import Program, Workspace


class Sandbox:
    """Runs Python source and commands in jails. Thread-safe.

    Args:
        limits: Resource limits of each run.
        tier: "bubblewrap", "unshare" or "rlimits". None selects the best tier that passes its self-test here.
        allow_unsafe: Run with resource limits only if no tier passes. The program can then read the files of this
            machine and use its network.

    Raises:
        SandboxUnavailableError: The tier fails its self-test.
        ConfigError: The tier is unknown.
    """

    def __init__(self, limits: SandboxLimits | None = None, tier: str | None = None, allow_unsafe: bool = False):
        self.limits = limits or SandboxLimits()
        folders.sweep()
        self.tier = choose_tier(tier, allow_unsafe)
        self._interpreter = find_interpreter()

    def describe(self) -> str:
        """Return the jail in one line, for logs and reports."""
        tested = "; its self-test passed" if self.tier.isolates else ""
        groups = f"control groups for {' and '.join(cgroup.parents())}" if cgroup.parents() else "no control groups"
        return f"{self.tier.name}: {self.tier.summary}; {groups}; runs {self._interpreter.executable}{tested}"

    def run(
        self, program: Program, files: Mapping[str, bytes | str] | None = None, stdin: bytes = b""
    ) -> SandboxResult:
        """Run Python source (a string) or a command (a list) in a new folder that contains `files`.

        Raises:
            JailError: The jail failed. Failures of the program are in the result.
        """
        with self.workspace(files) as workspace:
            return workspace.run(program, stdin)

    async def run_async(
        self, program: Program, files: Mapping[str, bytes | str] | None = None, stdin: bytes = b""
    ) -> SandboxResult:
        """Call `run` in a thread. Cancelling the wait does not end the program before its wall limit."""
        return await asyncio.to_thread(self.run, program, files, stdin)

    def workspace(self, files: Mapping[str, bytes | str] | None = None) -> Workspace:
        """Return a folder for several commands, each in its own jail: `with sandbox.workspace() as workspace: ...`."""
        workspace = Workspace(self.start, self._interpreter)
        try:
            workspace.write_all(files or {})
        except BaseException:
            workspace.close()
            raise
        return workspace

    def start(self, paths: JailPaths) -> Jail:
        """Start a jail around a folder."""
        return Jail(self.tier, paths, self.limits)


def choose_tier(name: str | None, allow_unsafe: bool) -> Tier:
    """Return the tier of that name, or the best tier that passes its self-test on this machine."""
    if name is not None and name not in TIERS:
        raise ConfigError(f"sandbox tier {name!r} is unknown; there are {', '.join(TIERS)}.")
    reasons = []
    for tier in TIERS.values() if name is None else [TIERS[name]]:
        if not tier.isolates and not allow_unsafe:
            reasons.append(f"{tier.name}: no jail, and allow_unsafe was not set")
        elif reason := why_not(tier.name):
            reasons.append(f"{tier.name}: {reason}")
        else:
            return tier
    raise SandboxUnavailableError(_refusal(reasons))


def _refusal(reasons: list[str]) -> str:
    install = ", or ".join(tier.install for tier in TIERS.values() if tier.install)
    return (
        "Model-written code is not run, because no jail works on this machine.\n"
        + "".join(f"  {reason}\n" for reason in reasons)
        + f"Install {install}. In a container, allow user namespaces: Docker needs --security-opt with each of "
        "seccomp=unconfined, apparmor=unconfined and systempaths=unconfined, Ubuntu needs "
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0.\n"
        "On a machine without valuable data and without a network, allow_unsafe=True runs the code with resource "
        "limits only: it can then read every file of its user and use the network."
    )
