"""The key/value cache: one arena of equal pages, from which layers of every kind draw. Nothing splits it beforehand.

X pages of the arena, P positions a page, G key/value heads, K key dim, V value dim, B sequences, Y pages of a table.

Layers that remember the same (`KVSpec`) form a group and share page tables: a page holds P positions for all of them.
Groups differ in bytes per position, and so in P, but every page has the same bytes. A position has a fixed place:
row p % P of the page `table[p // P]`. Full layers keep all their pages; sliding layers give back those behind their
window. MTP heads lag behind the main layers, but use the same positions, and so the same tables.

Pages are counted by reference, because requests with the same beginning share them (`openmimo.engine.prefix`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from openmimo.model.attention import KVSpec, kv_spec
from openmimo.model.config import AttentionConfig

_USUAL_POSITIONS = 1024  # what a page's half-filled end is weighed against in layers that keep everything
_MAX_PAGE_POSITIONS = 64
_MAX_BLOCK_POSITIONS = 128
_MIN_BLOCK_POSITIONS = 16
_COST_OF_SMALL_PAGES = 0.01
_FIRST_TABLE_PAGES = 64


@dataclass(frozen=True)
class PageGroup:
    """Layers that remember the same, and how many positions one page holds for all of them."""

    spec: KVSpec
    layers: tuple[int, ...]
    page_positions: int

    def first_page_kept(self, length: int, margin: int) -> int:
        """The first page that a query at position `length` (or up to `margin` before it) still reads."""
        if self.spec.keep_positions is None:
            return 0
        return max(length - self.spec.keep_positions - margin, 0) // self.page_positions

    def pages_until(self, length: int) -> int:
        """How many pages cover the positions below `length`."""
        return -(-length // self.page_positions)


@dataclass(frozen=True)
class PageLayout:
    """How an arena is cut. block_positions: the fewest positions, times a whole number, that fill pages everywhere."""

    groups: tuple[PageGroup, ...]
    page_numbers: int
    block_positions: int


def plan_pages(layers: Sequence[AttentionConfig]) -> PageLayout:
    """Groups the layers and picks the page size that wastes least: unused ends of pages, and half-filled last pages."""
    layers_of: dict[KVSpec, list[int]] = {}
    for index, layer in enumerate(layers):
        layers_of.setdefault(kv_spec(layer), []).append(index)
    numbers = {spec: len(indices) * spec.bytes_per_position(1) for spec, indices in layers_of.items()}
    sizes = {positions * numbers[spec] for spec in numbers for positions in range(1, _MAX_PAGE_POSITIONS + 1)}
    fitting = [size for size in sizes if size >= max(numbers.values())]
    page_numbers = min(sorted(fitting), key=lambda size: _waste(size, numbers))
    groups = tuple(
        PageGroup(spec, tuple(indices), min(page_numbers // numbers[spec], _MAX_PAGE_POSITIONS))
        for spec, indices in layers_of.items()
    )
    block = math.lcm(*(group.page_positions for group in groups))
    return PageLayout(groups, page_numbers, block * -(-_MIN_BLOCK_POSITIONS // block))


def _waste(page_numbers: int, numbers: dict[KVSpec, int]) -> float:
    positions = {spec: min(page_numbers // numbers[spec], _MAX_PAGE_POSITIONS) for spec in numbers}
    if math.lcm(*positions.values()) > _MAX_BLOCK_POSITIONS:
        return math.inf
    shares = []
    for spec, count in positions.items():
        kept = _USUAL_POSITIONS if spec.keep_positions is None else spec.keep_positions
        shares.append(1 - count * numbers[spec] / page_numbers + count / kept)
    return max(shares) + _COST_OF_SMALL_PAGES / min(positions.values())


class PageArena:
    """The memory of all caches of one engine.

    layers: `ModelConfig.attention_layers()`, the main layers and then the MTP heads that draft. cache_bytes: the whole
    budget; untouched pages cost nothing on a CPU, where memory is given out on first use. dtype: of keys and values as
    stored. The arena starts zeroed, so that a row nobody wrote is finite.
    """

    def __init__(
        self,
        layers: Sequence[AttentionConfig],
        *,
        cache_bytes: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.layout = plan_pages(layers)
        self.page_bytes = self.layout.page_numbers * dtype.itemsize
        self.num_pages = cache_bytes // self.page_bytes
        self.dtype = dtype
        self._layers = tuple(layers)
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._references = [0] * self.num_pages
        storage = _zeros(self.num_pages, self.layout.page_numbers, dtype, torch.device(device))
        self.group_of_layer = [0] * len(layers)
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = [(storage, storage)] * len(layers)
        for number, group in enumerate(self.layout.groups):
            for place, layer in enumerate(group.layers):
                self.group_of_layer[layer] = number
                self._views[layer] = _layer_views(storage, group, place)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys [X, P, G, K] and values [X, P, G, V]: views into the arena."""
        return self._views[layer]

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - len(self._free)

    def take(self) -> int:
        """A free page, now held once. The caller has made sure that there is one."""
        page = self._free.pop()
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a held page."""
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One holder fewer; the last one frees the page."""
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether several hold the page."""
        return self._references[page] > 1

    def pages_for(self, length: int, margin: int) -> int:
        """Pages that a sequence of `length` positions holds."""
        return sum(group.pages_until(length) - group.first_page_kept(length, margin) for group in self.layout.groups)

    def ideal_bytes(self, length: int) -> int:
        """Bytes of what `length` positions must remember, without pages."""
        kept = (kv_spec(layer) for layer in self._layers)
        return sum(
            (length if spec.keep_positions is None else min(length, spec.keep_positions))
            * spec.bytes_per_position(self.dtype.itemsize)
            for spec in kept
        )

    def all_global_bytes(self, length: int) -> int:
        """Bytes of `length` positions in a model of full layers, see `all_global_cache_bytes`."""
        return all_global_cache_bytes(self._layers, length, self.dtype)


def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU from the system, which gives memory on first use (torch.zeros writes it all)."""
    if device.type == "cpu":
        empty = np.zeros(rows * columns * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(empty).view(dtype).view(rows, columns)
    return torch.zeros(rows, columns, dtype=dtype, device=device)


def _layer_views(storage: torch.Tensor, group: PageGroup, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    pages, page_numbers = storage.shape
    P, G, K, V = group.page_positions, group.spec.num_kv_heads, group.spec.key_dim, group.spec.value_dim
    start = place * P * G * (K + V)
    keys = storage.as_strided((pages, P, G, K), (page_numbers, G * K, K, 1), start)
    values = storage.as_strided((pages, P, G, V), (page_numbers, G * V, V, 1), start + P * G * K)
    return keys, values


def all_global_cache_bytes(layers: Sequence[AttentionConfig], num_positions: int, dtype: torch.dtype) -> int:
    """Bytes for `num_positions` if every one of `layers` were like the model's full layers (paper table 1).

    Without a full layer among them, each is counted with its own geometry, every position kept.
    """
    full = next((spec for spec in layers if kv_spec(spec).keep_positions is None), None)
    return num_positions * sum(kv_spec(full or spec).bytes_per_position(dtype.itemsize) for spec in layers)


class PageTables:
    """Which pages one sequence holds, group by group: int32 arrays from page number to page, -1 where none is held.

    margin: how many positions before its newest a sequence may still have to read from (MTP heads lag).
    """

    def __init__(self, arena: PageArena, margin: int):
        self._arena = arena
        self._margin = margin
        self._tables = [np.full(_FIRST_TABLE_PAGES, -1, dtype=np.int32) for _ in arena.layout.groups]
        self._first = [0] * len(self._tables)  # pages before it were given back
        self._stop = [0] * len(self._tables)

    def table(self, group: int) -> np.ndarray:
        """The table of a group, int32 [pages so far]."""
        return self._tables[group][: self._stop[group]]

    @property
    def num_pages(self) -> int:
        """Pages held."""
        return sum(int(np.count_nonzero(table >= 0)) for table in self._held_tables())

    def held(self) -> list[int]:
        """The pages held."""
        return [page for table in self._held_tables() for page in table[table >= 0].tolist()]

    def mark_held(self, is_held: np.ndarray) -> None:
        """Sets the entries of the pages held in a bool array of all pages."""
        for table in self._held_tables():
            is_held[table[table >= 0]] = True

    def _held_tables(self) -> list[np.ndarray]:
        return [self.table(group)[first:] for group, first in enumerate(self._first)]

    def missing(self, length: int) -> int:
        """How many pages `reach(length)` must find free."""
        count = 0
        for number, group in enumerate(self._arena.layout.groups):
            stop = group.pages_until(length)
            if stop > self._stop[number]:
                count += stop - max(self._stop[number], group.first_page_kept(length, self._margin))
        return count

    def reach(self, length: int, *, spare_pages: int = 0) -> None:
        """Takes the pages for all positions below `length`.

        Positions that sliding layers will have left behind by then get a page only out of `spare_pages`: nobody has to
        remember them, but another request with the same beginning could use them.
        """
        for number, group in enumerate(self._arena.layout.groups):
            stop = group.pages_until(length)
            if stop <= self._stop[number]:
                continue
            table = self._grown(number, stop)
            wanted = max(self._stop[number], group.first_page_kept(length, self._margin))
            spared = min(wanted - self._stop[number], spare_pages)
            spare_pages -= spared
            for page in range(wanted - spared, stop):
                table[page] = self._arena.take()
            self._stop[number] = stop

    def adopt(self, group: int, pages: list[int]) -> None:
        """Starts an empty table with pages of others (-1: none), of which it becomes one more holder."""
        self._grown(group, len(pages))[: len(pages)] = pages
        self._stop[group] = len(pages)
        for page in pages:
            if page >= 0:
                self._arena.share(page)

    def leave_behind(self, length: int) -> None:
        """Gives back what a sequence of `length` positions no longer reads."""
        for number, group in enumerate(self._arena.layout.groups):
            first = group.first_page_kept(length, self._margin)
            if first > self._first[number]:
                self._release(number, self._first[number], min(first, self._stop[number]))
                self._first[number] = first

    def release(self) -> None:
        """Gives back everything."""
        for number in range(len(self._tables)):
            self._release(number, self._first[number], self._stop[number])
            self._first[number] = self._stop[number] = 0

    def _release(self, group: int, first: int, stop: int) -> None:
        table = self._tables[group]
        for place in range(first, stop):
            page = int(table[place])
            if page >= 0:
                self._arena.release(page)
                table[place] = -1

    def _grown(self, group: int, pages: int) -> np.ndarray:
        table = self._tables[group]
        if pages > len(table):
            table = np.full(max(pages, 2 * len(table)), -1, dtype=np.int32)
            table[: self._stop[group]] = self._tables[group][: self._stop[group]]
            self._tables[group] = table
        return table
