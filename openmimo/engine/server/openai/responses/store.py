"""Responses that later requests can continue, retrieve and delete. They are in memory, bounded in size and in time."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openmimo.engine.server.openai.responses.schema import InputItem

_ITEM_BYTES = 1024  # of an item in memory, in addition to its text


@dataclass(frozen=True)
class StoredResponse:
    """A response with its conversation.

    Attributes:
        response: The response object.
        input_items: The items of its request, as clients list them.
        conversation: All items up to and including its output.
        num_characters: Length of their texts.
        num_bytes: Estimated size in memory.
    """

    response: dict[str, Any]
    input_items: Sequence[dict[str, Any]]
    conversation: Sequence[InputItem]
    num_characters: int
    num_bytes: int

    @property
    def id(self) -> str:
        """The response's id."""
        return self.response["id"]


def estimated_bytes(num_characters: int, num_items: int) -> int:
    """Estimate the size in memory of items with a text of `num_characters`."""
    return num_characters + num_items * _ITEM_BYTES


class ResponseStore:
    """A least recently used cache of responses.

    A response belongs to everyone who knows its id, or to one `owner`: a WebSocket connection, which can continue its
    own last response even if that is not to be stored.

    Args:
        max_bytes: Maximum size of all responses. 0 stores nothing.
        seconds: Time after its last use for which a response is kept.
        clock: Returns the time in seconds.
    """

    def __init__(self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._clock = clock
        self._num_bytes = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._items: dict[str, tuple[str, dict[str, Any]]] = {}  # of all responses, with the id of their response
        self._response_of_owner: dict[object, str] = {}

    def __len__(self) -> int:
        self._drop_expired()
        return len(self._entries)

    def put(self, stored: StoredResponse, owner: object | None = None) -> None:
        """Add a response, and drop the least recently used ones beyond the maximum size.

        A response that is larger than the maximum is not added. An owner has one response: the last.
        """
        self._drop_expired()
        if owner is not None:
            self.forget(owner)
        if stored.num_bytes > self._max_bytes:
            return
        while self._num_bytes + stored.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[stored.id] = _Entry(stored, owner, self._clock())
        self._num_bytes += stored.num_bytes
        if owner is not None:
            self._response_of_owner[owner] = stored.id
        self._items |= {item["id"]: (stored.id, item) for item in _items(stored)}

    def get(self, response_id: str, owner: object | None = None) -> StoredResponse | None:
        """Return a response, or None if there is none with this id that `owner` may use."""
        self._drop_expired()
        entry = self._entries.get(response_id)
        if entry is None or entry.owner not in (None, owner):
            return None
        entry.last_used = self._clock()
        self._entries.move_to_end(response_id)
        return entry.stored

    def find_item(self, item_id: str, owner: object | None = None) -> dict[str, Any] | None:
        """Return the input or output item with this id of a response that `owner` may use, or None."""
        response_id, item = self._items.get(item_id, ("", None))
        return None if self.get(response_id, owner) is None else item

    def delete(self, response_id: str) -> bool:
        """Drop a response without an owner. Returns whether there was one."""
        if self.get(response_id) is None:
            return False
        self._drop(response_id)
        return True

    def forget(self, owner: object) -> None:
        """Drop the response of an owner."""
        if owner in self._response_of_owner:
            self._drop(self._response_of_owner[owner])

    def _drop_expired(self) -> None:
        oldest = self._clock() - self._seconds
        while self._entries and next(iter(self._entries.values())).last_used < oldest:
            self._drop(next(iter(self._entries)))

    def _drop(self, response_id: str) -> None:
        entry = self._entries.pop(response_id)
        stored = entry.stored
        self._num_bytes -= stored.num_bytes
        if entry.owner is not None:
            del self._response_of_owner[entry.owner]
        for item in _items(stored):
            del self._items[item["id"]]


@dataclass
class _Entry:
    stored: StoredResponse
    owner: object | None
    last_used: float


def _items(stored: StoredResponse) -> list[dict[str, Any]]:
    return [*stored.input_items, *stored.response["output"]]
