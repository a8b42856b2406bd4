"""The engine's side of the wire: a script answers calls, one JSON object a line. Standard library alone.

Every engine under measurement is a process of its own, so that none shares threads, memory or packages with another.
A side is an object whose methods are the calls:

    load(folder, threads, max_sequences, max_length) -> {"versions": ..., "notes": ...}
    greedy(prompt, count) -> {"tokens": [...], "logprobs": [...]}
    start(prompts)      reads the prompts and keeps them decoding
    steps(count) -> [Cost of each step of the whole batch]
    stop()              lets go of them
    prefill(prompt) -> Cost of reading a prompt, up to its first token
    first_token(prompt) -> Cost of the same while what was started goes on decoding; raises NotSupported without it

A Cost is {"wall_ms": ..., "cpu_ms": ...}, the second that of all threads of the process.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TextIO


class NotSupported(Exception):  # noqa: N818 - a fact about a peer, no failure of ours
    """What this engine cannot do; the run leaves it out and says so."""


def serve(side: object) -> None:
    """Answers calls until standard input ends. What the engine prints goes to standard error."""
    replies = _own_stdout()
    for line in sys.stdin:
        call = json.loads(line)
        try:
            reply = {"result": getattr(side, call["method"])(**call["arguments"])}
        except NotSupported as error:
            reply = {"not_supported": str(error)}
        except Exception:  # the caller raises it again; this process must not end with a half line
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def cost_of(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that `work` took: on the clock, and of CPU in all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_ms": 1e3 * (time.perf_counter() - wall), "cpu_ms": 1e3 * (time.process_time() - cpu)}


def _own_stdout() -> TextIO:
    """The real standard output; from now on everybody else's is standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies
