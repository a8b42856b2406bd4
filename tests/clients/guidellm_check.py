"""guidellm: a short benchmark of the server."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import Served, check, main

for name, route in (("chat", "/v1/chat/completions"), ("completions", "/v1/completions")):

    @check(f"guidellm {name}")
    def _(served: Served, route: str = route) -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [
                *(str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"),
                # The model's name is also the path of the tokenizer.
                *("--backend", f"kind=openai_http,target={served.url},model={served.folder},request_format={route}"),
                *("--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=8"),
                *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4"),
                *("--output", f"kind=json,path={report}"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            benchmark = json.loads(report.read_text())["benchmarks"][0]
            totals = benchmark["metrics"]["request_totals"]
            # On a loaded machine, guidellm closes its queues before it has counted the last request.
            assert totals["successful"] in (3, 4) and totals["errored"] == 0, totals


main("guidellm")
