"""Files of audio codes: a safetensors tensor `codes`, int32 [frames, codebooks], and the length of the recording."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from openmimo.core.errors import DataError
from openmimo.core.files import new_file_atomic, require_file

_FORMAT = "openmimo audio codes"


@dataclass(frozen=True)
class Codes:
    """The codes of a recording.

    Attributes:
        codes_FQ: Integer codes, [frames, codebooks].
        num_samples: Samples of the recording, which the decoded sound is cut to.
    """

    codes_FQ: np.ndarray
    num_samples: int

    def first(self, codebooks: int | None) -> "Codes":
        """The codes of the first codebooks (None: all). Raises DataError if there are fewer."""
        most = self.codes_FQ.shape[1]
        if codebooks is None:
            return self
        if not 1 <= codebooks <= most:
            raise DataError(f"--codebooks is {codebooks}; these codes have 1 to {most}.")
        return replace(self, codes_FQ=self.codes_FQ[:, :codebooks])


def save_codes(path: Path, codes: Codes) -> None:
    """Writes a file of codes, which appears under its name when it is complete. Raises OSError."""
    metadata = {"format": _FORMAT, "num_samples": str(codes.num_samples)}
    with new_file_atomic(path) as file:
        file.write(save({"codes": np.ascontiguousarray(codes.codes_FQ, np.int32)}, metadata))


def load_codes(path: Path) -> Codes:
    """Reads a file of codes. Raises DataError if it is none."""
    require_file(path, DataError)
    try:
        with safe_open(path, "np") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            found = file.get_tensor("codes") if names == ["codes"] else np.zeros(0)
    except (SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy lacks
        raise DataError(f"{path} is no file of codes ({error}). `openmimo audio encode` writes one.") from error
    samples = metadata.get("num_samples", "")
    if metadata.get("format") != _FORMAT or found.dtype != np.int32 or found.ndim != 2 or not samples.isdecimal():
        raise DataError(f"{path} is a safetensors file, but none of codes. `openmimo audio encode` writes one.")
    return Codes(found, int(samples))
