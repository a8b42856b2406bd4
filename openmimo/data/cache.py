"""Where downloaded and tokenized data is kept between runs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from openmimo.core.errors import DataError


def cache_folder() -> Path:
    """The folder that $OPENMIMO_CACHE names, else ~/.cache/openmimo. It may not exist yet; all in it can be rebuilt."""
    return Path(os.environ.get("OPENMIMO_CACHE") or Path.home() / ".cache" / "openmimo")


@contextlib.contextmanager
def writing_to_cache() -> Iterator[None]:
    """Turns an OSError in the cache (a read-only or full disk) into a DataError that says how to use another folder."""
    try:
        yield
    except OSError as error:
        folder = os.path.realpath(cache_folder())
        if not os.path.realpath(error.filename or "").startswith(folder):
            raise
        raise DataError(
            f"the cache {folder} cannot be written: {error.strerror} ({error.filename}). Name a folder with room that "
            "can be written in the environment variable OPENMIMO_CACHE."
        ) from error
