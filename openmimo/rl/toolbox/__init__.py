"""Tools of agents: quotas, rates, deadlines and warm workers (Toolbox), and sessions of episodes (ToolSessions).

The Toolbox enforces the global limits of all episodes in a process or a cluster. A session belongs to one episode: its
environment, its calls and its reward (paper section 4.6.3, Toolbox and Tool Manager).
"""

from openmimo.rl.toolbox.box import Tool, Toolbox
from openmimo.rl.toolbox.records import ToolCounts, ToolFailureError, ToolLimits, ToolMistakeError, ToolResult
from openmimo.rl.toolbox.sessions import ToolSession, ToolSessions
from openmimo.rl.toolbox.shared import close_shared, shared, shared_metrics
from openmimo.rl.toolbox.warm import WarmEnvironments
from openmimo.rl.toolbox.workers import ThreadWorkers, Worker, WorkerPool

__all__ = [
    "ThreadWorkers", "Tool", "ToolCounts", "ToolFailureError", "ToolLimits", "ToolMistakeError", "ToolResult",
    "ToolSession", "ToolSessions", "Toolbox", "WarmEnvironments", "Worker", "WorkerPool", "close_shared", "shared",
    "shared_metrics",
]  # fmt: skip
