"""What the server allows, without torch or a web framework."""

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Annotated

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, check_fields

_KEY_VARIABLE = "OPENMIMO_API_KEY"
_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, and its limits.

    Attributes:
        host: Address to listen on; any but this machine's own needs an api_key.
        port: Port to listen on (0: a free one).
        api_key: What clients must send as "Authorization: Bearer KEY" (none: what the environment variable
            OPENMIMO_API_KEY holds; where that is not set either, nothing is asked).
        allowed_hosts: Names, besides the host's own and those of this machine, that requests may give as their Host
            ("*": any). Without an api_key no other name is answered, so that no web site can point its own at this
            server; with one, any is, unless this says which.
        allowed_origins: Web pages that may use the server, such as https://example.org ("*": all). The chat page needs
            none.
        model_name: The name that clients know the model by (empty: the checkpoint's).
        max_tokens: New tokens of one reply, at most; also the default where a client names none.
        max_body_bytes: Size of a request, at most.
        max_open_bytes: Sizes of all requests that are read or answered, together, at most; beyond that, clients are
            asked to come back (429).
        max_choices: Prompts times n of one request, at most.
        max_queue: Replies that may wait for their first token; beyond that, clients are told to come back (429).
        retry_after_seconds: When to come back, as told to clients.
        request_timeout_seconds: How long one request may take, waiting included.
        drain_timeout_seconds: How long running requests may go on after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Bounds(least=0, most=65535)] = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    model_name: str = ""
    max_tokens: PositiveInt = 32768
    max_body_bytes: PositiveInt = 4 * 2**20
    max_open_bytes: PositiveInt = 32 * 2**20
    max_choices: PositiveInt = 128
    max_queue: PositiveInt = 256
    retry_after_seconds: PositiveInt = 1
    request_timeout_seconds: PositiveFloat = 600.0
    drain_timeout_seconds: NonNegativeFloat = 30.0

    def __post_init__(self) -> None:
        check_fields(self, "ServerConfig")
        for host in self.allowed_hosts:
            if "/" in host or not host:
                raise ConfigError(f"ServerConfig.allowed_hosts holds {host!r}; give names alone, such as example.org.")
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"ServerConfig.allowed_origins holds {origin!r}; an origin is a scheme and a host, such as "
                    "https://example.org or http://localhost:3000."
                )
        key = self.required_key
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ConfigError(f"ServerConfig.api_key (or {_KEY_VARIABLE}) must be printable ASCII, and not empty.")
        if key is None and not is_loopback(self.host):
            raise ConfigError(
                f"ServerConfig.host is {self.host}, which other machines can reach, and there is no api_key; "
                f"set one ({_KEY_VARIABLE}, or --api-key), or listen on 127.0.0.1."
            )

    @property
    def answered_hosts(self) -> tuple[str, ...] | None:
        """The Host names that are answered, those of this machine aside; None: any."""
        if "*" in self.allowed_hosts or (self.required_key is not None and not self.allowed_hosts):
            return None
        return (self.host, *self.allowed_hosts)

    @property
    def required_key(self) -> str | None:
        """What clients must send; None: nothing."""
        return os.environ.get(_KEY_VARIABLE) if self.api_key is None else self.api_key


def is_loopback(host: str) -> bool:
    """Whether a host name or address is always this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
