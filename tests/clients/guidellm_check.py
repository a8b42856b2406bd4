"""guidellm: a short benchmark of the server."""

import json
import os
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
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            benchmark = json.loads(report.read_text())["benchmarks"][0]
            totals = benchmark["metrics"]["request_totals"]
            assert (totals["successful"], totals["errored"]) == (4, 0), totals


main("guidellm")
