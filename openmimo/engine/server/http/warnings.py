"""Warnings to clients about parts of a request that have no effect, in a header of the response."""

from collections.abc import Sequence

from starlette.responses import Response

from openmimo.engine.server.http.limits import shortened

WARNING_HEADER = "X-OpenMiMo-Warning"
_MAX_CHARACTERS = 1000


def skipped(parts: Sequence[str]) -> list[str]:
    """Return the warnings for parts of a request that the server skips, such as tools of a provider."""
    return [f"{part} skipped, because the server does not run it" for part in parts]


def warn(response: Response, warnings: Sequence[str]) -> Response:
    """Add warnings to the headers of a response, and return it. Headers contain only printable ASCII."""
    if warnings:
        text = shortened("; ".join(warnings), _MAX_CHARACTERS)
        printable = "".join(character if character.isascii() and character.isprintable() else "?" for character in text)
        earlier = response.headers.get(WARNING_HEADER)
        response.headers[WARNING_HEADER] = f"{earlier}; {printable}" if earlier else printable
    return response
