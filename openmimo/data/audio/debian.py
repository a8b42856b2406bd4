"""Speech from Debian's packages, unpacked without root: by apt where it is installed, else from Debian's pool.

apt checks the signature of what it loads. A file from the pool is checked against a SHA-256 that stands here.
"""

import contextlib
import hashlib
import io
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openmimo.core.errors import DataError

_POOL = "http://deb.debian.org/debian/pool/main"
_SECONDS = 300
_HEADER_BYTES = 60


@dataclass(frozen=True)
class Package:
    """A package with speech.

    Attributes:
        name: Its name.
        path: Its file in Debian's pool.
        sha256: SHA-256 of that file, in hexadecimal.
        num_bytes: Size of that file.
        folder: The folder with its sounds, below the root.
        license: Who recorded them, and their license.
    """

    name: str
    path: str
    sha256: str
    num_bytes: int
    folder: str
    license: str


PROMPTS = Package(
    "asterisk-core-sounds-en-g722",
    "a/asterisk-core-sounds/asterisk-core-sounds-en-g722_1.6.1-1_all.deb",
    "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    10_565_860,
    "usr/share/asterisk/sounds/en_US_f_Allison",
    "Telephone prompts, 16 kHz: recorded by Allison Smith for Digium, Creative Commons BY-SA 3.0. Recordings that are "
    "made from them, composed prompts and the speech of a model trained on them included, are under the same license.",
)
OTHER_VOICES = Package(
    "pocketsphinx-testdata",
    "p/pocketsphinx/pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb",
    "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    1_822_580,
    "usr/share/pocketsphinx/test/data",
    "Test data of PocketSphinx, 16 kHz: Carnegie Mellon University, BSD 2-clause. Its recordings of LibriVox are in "
    "the public domain.",
)


def fetch(package: Package, folder: Path) -> Path:
    """Returns the folder of a package's sounds below `folder`; loads and unpacks the package if it is not there.

    Raises:
        DataError: The package cannot be loaded or unpacked, or is not the file that is expected.
    """
    root = folder / package.name
    sounds = root / package.folder
    if not sounds.is_dir():
        partial = folder / f"{package.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if shutil.which("apt-get") and shutil.which("dpkg-deb"):
            _run(["dpkg-deb", "-x", _from_apt(package, partial), "."], package, partial)
        else:
            _unpack(_from_pool(package), package, partial)
        partial.rename(root)
    if not sounds.is_dir():
        raise DataError(f"{package.name} has no folder {package.folder} in {root}; this version of it is not known.")
    return sounds


def _from_apt(package: Package, folder: Path) -> str:
    _run(["apt-get", "download", package.name], package, folder)
    return next(folder.glob("*.deb")).name


def _run(command: list[str], package: Package, folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"`{' '.join(command)}` failed: {error.stderr[-300:].strip()} Run apt-get update, or give a folder with "
            f"the sounds of {package.name} (--sounds)."
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"`{' '.join(command)}` did not run: {error}.") from error


def _from_pool(package: Package) -> bytes:
    """The package's file from Debian's pool, at most one byte more than it should have."""
    address = f"{_POOL}/{package.path}"
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as response:
            data = response.read(package.num_bytes + 1)
    except (OSError, urllib.error.URLError) as error:
        raise DataError(
            f"{address} cannot be loaded ({error}). Load {package.name} elsewhere, unpack it, and give its folder of "
            "sounds (--sounds)."
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != package.sha256:
        raise DataError(f"{address} has the SHA-256 {found}, not {package.sha256}; it is not used.")
    return data


def _unpack(data: bytes, package: Package, folder: Path) -> None:
    """Unpacks the files of a .deb: an ar archive whose member data.tar.* has them."""
    member = next((content for name, content in _members(data) if name.startswith("data.tar")), None)
    if member is None:
        raise DataError(f"the file of {package.name} has no data.tar and is no Debian package.")
    try:
        with contextlib.closing(tarfile.open(fileobj=io.BytesIO(member))) as archive:
            archive.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise DataError(f"the file of {package.name} cannot be unpacked: {error}.") from error


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of an ar archive: 60 bytes of header with name and size, the content, and a byte if it is odd."""
    place = len(b"!<arch>\n")
    while place + _HEADER_BYTES <= len(data):
        header = data[place : place + _HEADER_BYTES].decode("ascii", "replace")
        place += _HEADER_BYTES
        size = int(header[48:58]) if header[48:58].strip().isdecimal() else 0
        yield header[:16].rstrip(" /"), data[place : place + size]
        place += size + size % 2
