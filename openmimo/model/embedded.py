"""The tiny checkpoint that is part of the package, for commands without a checkpoint. Imports no torch."""

import sys
from pathlib import Path

EMBEDDED = str(Path(__file__).parents[1] / "assets" / "tiny-mimo")
_NOTICE = (
    "no checkpoint given: using the built-in tiny model (1.6 million parameters), trained for small tasks such as "
    "'sort 31524'"
)


def announce(path: str) -> None:
    """Print one line on standard error if `path` is the default of a command, the embedded checkpoint."""
    if path == EMBEDDED:
        print(_NOTICE, file=sys.stderr, flush=True)
