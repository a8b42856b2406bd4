"""What the server allows, without torch or a web framework."""

import ipaddress
import os
from dataclasses import dataclass

from openmimo.core.errors import ConfigError

_KEY_VARIABLE = "OPENMIMO_API_KEY"


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, and its limits.

    Attributes:
        host: Address to listen on; any but this machine's own needs an api_key.
        port: Port to listen on (0: a free one).
        api_key: What clients must send as "Authorization: Bearer KEY" (none: what the environment variable
            OPENMIMO_API_KEY holds; where that is not set either, nothing is asked).
        model_name: The name that clients know the model by (empty: the checkpoint's).
        max_tokens: New tokens of one reply, at most; also the default where a client names none.
        max_body_bytes: Size of a request, at most.
        max_choices: Prompts times n of one request, at most.
        max_queue: Replies that may wait for their first token; beyond that, clients are told to come back (429).
        retry_after_seconds: When to come back, as told to clients.
        request_timeout_seconds: How long one request may take, waiting included.
        drain_timeout_seconds: How long running requests may go on after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    model_name: str = ""
    max_tokens: int = 32768
    max_body_bytes: int = 8 * 2**20
    max_choices: int = 128
    max_queue: int = 256
    retry_after_seconds: int = 1
    request_timeout_seconds: float = 600.0
    drain_timeout_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"ServerConfig.port is {self.port}; it must be 0 (a free one) to 65535.")
        for name in ("max_tokens", "max_body_bytes", "max_choices", "max_queue", "retry_after_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ServerConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.request_timeout_seconds > 0:
            raise ConfigError(
                f"ServerConfig.request_timeout_seconds is {self.request_timeout_seconds}; it must be above 0."
            )
        if not self.drain_timeout_seconds >= 0:
            raise ConfigError(
                f"ServerConfig.drain_timeout_seconds is {self.drain_timeout_seconds}; it must be 0 or more."
            )
        key = self.required_key
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ConfigError(f"ServerConfig.api_key (or {_KEY_VARIABLE}) must be printable ASCII, and not empty.")
        if key is None and not _is_loopback(self.host):
            raise ConfigError(
                f"ServerConfig.host is {self.host}, which other machines can reach, and there is no api_key; "
                f"set one ({_KEY_VARIABLE}, or --api-key), or listen on 127.0.0.1."
            )

    @property
    def required_key(self) -> str | None:
        """What clients must send; None: nothing."""
        return os.environ.get(_KEY_VARIABLE) if self.api_key is None else self.api_key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
