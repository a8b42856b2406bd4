"""The protocol of benchmark processes, in the process of an engine: a script answers calls, one JSON object per line.

Each measured engine runs in its own process and shares no threads, memory or packages with another. This module uses
only the standard library. A side is an object whose methods are the calls:

    load(folder, threads, max_sequences, max_length) -> {"versions": ..., "notes": ...}
    greedy(prompt, count) -> {"tokens": [...], "logprobs": [...]}
    start(prompts)      reads the prompts, which then decode
    steps(count) -> [Cost of each step of the whole batch]
    stop()              ends the started sequences
    prefill(prompt) -> Cost of reading a prompt, up to its first token
    first_token(prompt) -> Cost of the same while the started sequences decode; may raise NotSupported

A Cost is {"wall_ms": ..., "cpu_ms": ...}: wall time, and CPU time of all threads of the process.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TextIO


class NotSupported(Exception):  # noqa: N818 - a property of the peer and not an error
    """The engine does not support the call. The benchmark omits the measurement and reports it."""


def serve(side: object) -> None:
    """Answers calls until standard input ends. Redirects the output of the engine to standard error."""
    replies = _own_stdout()
    for line in sys.stdin:
        call = json.loads(line)
        try:
            reply = {"result": getattr(side, call["method"])(**call["arguments"])}
        except NotSupported as error:
            reply = {"not_supported": str(error)}
        except Exception:  # sent to the caller, which raises it
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def cost_of(work: Callable[[], object]) -> dict[str, float]:
    """Returns wall time of `work`, and CPU time of all threads, in milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_ms": 1e3 * (time.perf_counter() - wall), "cpu_ms": 1e3 * (time.process_time() - cpu)}


def _own_stdout() -> TextIO:
    """Returns the standard output of the process and redirects all other output to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies
