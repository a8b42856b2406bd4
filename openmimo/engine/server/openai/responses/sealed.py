"""Texts that a client keeps for the server: summaries and reasoning, in the field `encrypted_content`.

The text is encoded and not encrypted: it belongs to the client's own conversation, and the client may read it.
"""

import base64
import binascii

_PREFIX = "openmimo1."


def seal(text: str) -> str:
    """Encode a text for the field encrypted_content."""
    return _PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


def unseal(content: str) -> str | None:
    """Decode a text that `seal` encoded. Returns None for anything else, such as the content of another provider."""
    if not content.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(content.removeprefix(_PREFIX), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
