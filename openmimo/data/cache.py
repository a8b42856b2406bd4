"""Where downloaded and tokenised data is kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder that $OPENMIMO_CACHE names, else ~/.cache/openmimo. It may not exist yet; all in it can be rebuilt."""
    return Path(os.environ.get("OPENMIMO_CACHE") or Path.home() / ".cache" / "openmimo")
