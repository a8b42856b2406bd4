"""Codex CLI: runs that call its shell tool, as the script of the model says, over HTTP and over a WebSocket."""

import os
import subprocess
import tempfile
from pathlib import Path

from checks import MODEL, Served, check, main, node_packages
from scripted_agent import OUTPUT

QUESTION = "Run a command and report what it prints."
# Settings that are documented at https://developers.openai.com/codex/config-reference.
CONFIG = """
model = "{model}"
model_provider = "openmimo"
approval_policy = "never"
sandbox_mode = "danger-full-access"
check_for_update_on_startup = false
web_search = "disabled"

[analytics]
enabled = false

[feedback]
enabled = false

[otel]
exporter = "none"
metrics_exporter = "none"

[model_providers.openmimo]
name = "openmimo"
base_url = "{url}/v1"
wire_api = "responses"
supports_websockets = {websockets}
"""

for websockets in (False, True):

    @check(f"Codex CLI, codex exec with a shell command, {'WebSocket' if websockets else 'HTTP'}")
    def _(served: Served, websockets: bool = websockets) -> None:
        with tempfile.TemporaryDirectory() as folder:
            home, work = Path(folder) / "home", Path(folder) / "work"
            home.mkdir()
            work.mkdir()
            config = CONFIG.format(model=MODEL, url=served.scripted_url, websockets=str(websockets).lower())
            (home / "config.toml").write_text(config)
            command = ["node", str(node_packages() / "@openai/codex/bin/codex.js"), "exec", "--skip-git-repo-check"]
            done = subprocess.run(
                [*command, QUESTION], env={**os.environ, "CODEX_HOME": str(home)}, cwd=work,
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"\n{OUTPUT}\n" in done.stderr, done.stderr[-2000:]  # the command ran
        assert done.stdout.strip() == f"The command printed {OUTPUT}.", done.stdout


main(npm=("@openai/codex",))
