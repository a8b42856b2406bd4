"""The server's configuration: addresses, access and limits. Imports neither torch nor a web framework."""

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Annotated

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_fields

ANY = "*"  # in lists of names: any name
_KEY_VARIABLE = "OPENMIMO_API_KEY"
_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True)
class ServerConfig:
    """Listening address, access control and limits of the server.

    Attributes:
        host: Address to listen on. An address that other machines can reach requires an api_key.
        port: Port to listen on (0: a free one).
        api_key: Key that clients send as "Authorization: Bearer KEY" (default: the environment variable
            OPENMIMO_API_KEY; if that is not set either, no key is required).
        allowed_hosts: Host header names to accept in addition to `host` and the names of this machine ("*": any).
            Without an api_key, all other names are rejected, which protects against DNS rebinding. With an api_key
            and an empty list, any name is accepted.
        allowed_origins: Origins of web pages that may use the server, such as https://example.org ("*": all). The
            built-in chat page needs none.
        model_name: Model name in the API (empty: the name of the run or of the checkpoint folder).
        model_aliases: Further names of the model that requests may use ("*": any name).
        strict: Whether unknown fields of a request are rejected. Otherwise they are ignored, named in the header
            X-OpenMiMo-Warning of the response, and counted in /metrics.
        max_tokens: Maximum new tokens of one reply, and the default if a client sets no limit. Higher limits of
            requests are lowered to it.
        max_body_bytes: Maximum size of one request body.
        max_audio_bytes: Maximum size of one request body of a model that hears, in place of max_body_bytes if larger.
        max_audio_seconds: Maximum length of all recordings in one request.
        max_open_bytes: Maximum total size of the bodies of all open requests; beyond it, requests get a 429.
        max_choices: Maximum number of prompts times n of one request.
        max_queue: Maximum number of replies that wait for their first token; beyond it, requests get a 429.
        response_store_bytes: Maximum size of the stored responses, which previous_response_id continues; the least
            recently used are dropped. 0: none are stored.
        response_store_seconds: Time after its last use for which a response is stored.
        retry_after_seconds: Value of the Retry-After header of a 429.
        request_timeout_seconds: Time limit of one request, including its time in the queue.
        drain_timeout_seconds: Time that running requests may take to finish after SIGTERM.
        warm_up: Whether an accelerator captures its graphs before the server listens. Otherwise requests wait for it.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Bounds(least=0, most=65535)] = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    model_name: str = ""
    model_aliases: tuple[str, ...] = ()
    strict: bool = False
    max_tokens: PositiveInt = 32768
    max_body_bytes: PositiveInt = 4 * 2**20
    max_audio_bytes: PositiveInt = 25 * 2**20
    max_audio_seconds: PositiveFloat = 1800.0
    max_open_bytes: PositiveInt = 32 * 2**20
    max_choices: PositiveInt = 128
    max_queue: PositiveInt = 256
    response_store_bytes: NonNegativeInt = 64 * 2**20
    response_store_seconds: PositiveFloat = 24 * 3600.0
    retry_after_seconds: PositiveInt = 1
    request_timeout_seconds: PositiveFloat = 600.0
    drain_timeout_seconds: NonNegativeFloat = 30.0
    warm_up: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "ServerConfig")
        for host in self.allowed_hosts:
            if "/" in host or not host:
                raise ConfigError(
                    f"ServerConfig.allowed_hosts contains {host!r}; give host names only, such as example.org."
                )
        for origin in self.allowed_origins:
            if origin != ANY and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"ServerConfig.allowed_origins contains {origin!r}; an origin is a scheme and a host, such as "
                    "https://example.org or http://localhost:3000."
                )
        key = self.required_key
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ConfigError(f"ServerConfig.api_key (or {_KEY_VARIABLE}) must be non-empty printable ASCII.")
        if key is None and not is_loopback(self.host):
            raise ConfigError(
                f"ServerConfig.host is {self.host}, which other machines can reach, and there is no api_key; "
                f"set one ({_KEY_VARIABLE}, or --api-key), or listen on 127.0.0.1."
            )

    @property
    def answered_hosts(self) -> tuple[str, ...] | None:
        """Accepted Host header names, except those of this machine, which are always accepted. None: any name."""
        if ANY in self.allowed_hosts or (self.required_key is not None and not self.allowed_hosts):
            return None
        return (self.host, *self.allowed_hosts)

    @property
    def required_key(self) -> str | None:
        """The API key that clients must send; None if no key is required."""
        return os.environ.get(_KEY_VARIABLE) if self.api_key is None else self.api_key


def is_loopback(host: str) -> bool:
    """Whether a host name or address always refers to this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
