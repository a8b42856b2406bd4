"""Claude Code: one run that calls its shell tool, as the script of the model says."""

import json
import os
import subprocess
import tempfile

from checks import KEY, MODEL, Served, check, main, node_packages
from scripted_agent import OUTPUT

QUESTION = "Run a command and report what it prints."
# Settings that are documented at https://code.claude.com/docs/en/env-vars.
OFFLINE = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}


@check("Claude Code, claude -p with a shell command")
def _(served: Served) -> None:
    # The package's own start program is only in place if its installation script ran.
    program = next((node_packages() / "@anthropic-ai").glob("claude-code-*/claude"))
    environment = {
        **os.environ,
        **OFFLINE,
        "ANTHROPIC_API_KEY": KEY,
        "ANTHROPIC_BASE_URL": served.scripted_url,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
        "ANTHROPIC_MODEL": MODEL,
    }
    command = [str(program), "-p", QUESTION, "--allowedTools", "Bash", "--output-format", "json"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180
        )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    result = json.loads(done.stdout)
    assert not result["is_error"] and OUTPUT in result["result"] and result["num_turns"] == 2, result


main(npm=("@anthropic-ai/claude-code",))
