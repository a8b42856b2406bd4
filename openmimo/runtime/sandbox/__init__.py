"""Runs model-written programs so that they cannot harm the machine, read its files, or cheat the grader."""

from openmimo.runtime.sandbox.grading import CallTest, StreamTest, TestOutcome, grade, outcomes
from openmimo.runtime.sandbox.pool import SandboxPool
from openmimo.runtime.sandbox.records import JailError, SandboxLimits, SandboxResult, SandboxUnavailableError
from openmimo.runtime.sandbox.sandbox import Sandbox
from openmimo.runtime.sandbox.workspace import Workspace, WorkspaceError

__all__ = [
    "CallTest", "Sandbox", "JailError", "SandboxLimits", "SandboxPool", "SandboxResult", "SandboxUnavailableError",
    "StreamTest", "TestOutcome", "Workspace", "WorkspaceError", "grade", "outcomes",
]  # fmt: skip
