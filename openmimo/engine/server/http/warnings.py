"""Warnings to clients about parts of a request that have no effect, in the header Warning."""

from collections.abc import Sequence

from starlette.responses import Response

from openmimo.engine.server.http.limits import shortened

_MAX_CHARACTERS = 1000
_MISCELLANEOUS = 299  # warn-code of RFC 7234


def warn(response: Response, warnings: Sequence[str]) -> Response:
    """Add warnings to the headers of a response, and return it."""
    if warnings:
        text = shortened("; ".join(warnings), _MAX_CHARACTERS)
        printable = "".join(character if character.isascii() and character.isprintable() else "?" for character in text)
        quoted = printable.replace("\\", "\\\\").replace('"', '\\"')
        response.headers["Warning"] = f'{_MISCELLANEOUS} openmimo "{quoted}"'
    return response
