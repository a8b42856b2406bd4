"""The paged key/value cache: one arena of equal pages for the layers of every kind.

X pages of the arena, P positions per page, G key/value heads, K key dim, V value dim, B sequences, Y rows of a table.

Layers with the same `KVSpec` form a group and share a page table. Row y of the table covers positions y*P to
y*P + P - 1; P is a power of two. A page holds these positions for a few layers of the group, a part. So a row has one
page for each part:

    group of full layers, P = 32              group of sliding layers, P = 16
    part         0    1    2                  part         0    1    2    3
    layers      0-2  3-5  6-8                 layers      9-14 15-20 ...
    row 0        7   12    3   -> positions   row 0       -1   -1   -1   -1   behind the window: returned
    row 1        8    1    9      32 to 63    row 1        4    5   10   11   positions 16 to 31

`plan_pages` chooses the sizes of the parts such that a page has the same bytes in every group, up to a few percent.
Because pages are equal, full and sliding layers take memory from one arena in any proportion, and no ratio is fixed in
advance. Full layers keep all rows; sliding layers release the rows before their window. MTP heads lag behind the main
layers, but use the same positions and therefore the same tables. A layer that reads another layer's keys
(`KVSpec.source_layer`) is in no group and has no pages: it uses those of the source layer.

Pages have reference counts, because requests with a common prefix share them (`openmimo.engine.prefix`).
"""

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from openmimo.core.errors import ConfigError
from openmimo.kernels.attention import scale_bytes
from openmimo.model.attention import AttentionConfig, KVSpec, kv_spec

MIN_PAGE_POSITIONS, MAX_PAGE_POSITIONS = 16, 128
_DEFAULT_PAGE_POSITIONS = 32
_MAX_PADDING = 0.1  # share of a page
_COST_OF_A_PART = 0.002  # host work for one more page per row, as a share of the cache
_FIRST_TABLE_ROWS = 64


@dataclass(frozen=True)
class PageGroup:
    """Layers with the same `KVSpec`, and the shape of their pages.

    Attributes:
        spec: Keys and values that one layer caches.
        layers: Layer numbers.
        page_positions: Positions per page, P.
        layers_per_page: Layers per page; the last part of a group may have fewer.
        scale_numbers: Elements that hold the scale of a key or a value.
    """

    spec: KVSpec
    layers: tuple[int, ...]
    page_positions: int
    layers_per_page: int
    scale_numbers: int = 0

    @property
    def num_parts(self) -> int:
        """Pages of one table row."""
        return -(-len(self.layers) // self.layers_per_page)

    def first_row_kept(self, length: int, margin: int) -> int:
        """The first table row that a query at position `length`, or up to `margin` positions before it, still reads."""
        if self.spec.keep_positions is None:
            return 0
        return max(length - self.spec.keep_positions - margin, 0) // self.page_positions

    def rows_until(self, length: int) -> int:
        """Number of table rows that cover the positions below `length`."""
        return -(-length // self.page_positions)

    def pages_until(self, length: int) -> int:
        """Number of pages that cover the positions below `length`."""
        return self.rows_until(length) * self.num_parts


@dataclass(frozen=True)
class PageLayout:
    """The division of an arena into pages.

    Attributes:
        groups: The groups of layers.
        page_numbers: Elements (of keys and values) per page.
    """

    groups: tuple[PageGroup, ...]
    page_numbers: int

    @property
    def block_positions(self) -> int:
        """The smallest number of positions that fills whole rows in every group (all sizes are powers of two)."""
        return max(group.page_positions for group in self.groups)

    @property
    def pages_per_row(self) -> int:
        """Pages of one row, summed over the groups."""
        return sum(group.num_parts for group in self.groups)


def plan_pages(
    layers: Sequence[AttentionConfig],
    page_positions: int = _DEFAULT_PAGE_POSITIONS,
    *,
    dtype: torch.dtype = torch.float32,
) -> PageLayout:
    """Groups the layers and splits each group into parts such that pages have nearly equal bytes.

    Every combination of page sizes is tried; a model has few groups. `_waste` ranks them: least padding and least
    memory before windows, with a small cost per part.

    Args:
        layers: As in `PageArena`.
        page_positions: Positions per page of full layers: a power of two from 16 to 128. Sliding layers may get
            fewer, because a window that begins inside a page wastes the rest of the page.
        dtype: Of the stored keys and values; int8 rows hold their scales.
    """
    layers_of: dict[KVSpec, list[int]] = {}
    for index, layer in enumerate(layers):
        if kv_spec(layer).source_layer is None:
            layers_of.setdefault(kv_spec(layer), []).append(index)
    scale = scale_bytes(dtype) // dtype.itemsize
    choices = [_group_choices(spec, tuple(indices), page_positions, scale) for spec, indices in layers_of.items()]
    groups = min(itertools.product(*choices), key=_waste)
    return PageLayout(groups, max(map(_numbers, groups)))


def _group_choices(spec: KVSpec, layers: tuple[int, ...], page_positions: int, scale_numbers: int) -> list[PageGroup]:
    """All page shapes of a group: sliding layers may halve the positions, and layers split into 1, 2, ... parts."""
    positions = [page_positions]
    while spec.keep_positions is not None and positions[-1] > MIN_PAGE_POSITIONS:
        positions.append(positions[-1] // 2)
    sizes = sorted({-(-len(layers) // parts) for parts in range(1, len(layers) + 1)})
    return [PageGroup(spec, layers, count, size, scale_numbers) for count in positions for size in sizes]


def _numbers(group: PageGroup) -> int:
    numbers = group.spec.bytes_per_position(1, scale_bytes=group.scale_numbers)
    return group.layers_per_page * group.page_positions * numbers


def _waste(groups: tuple[PageGroup, ...]) -> tuple[bool, float]:
    """The sort key of a layout: whether padding exceeds the limit, then the wasted share plus the cost of parts.

    All pages have the bytes of the largest, so a group with smaller parts has padding in each page. A window begins in
    the middle of a page on average, which wastes P/2 positions of every `keep_positions`.
    """
    page_numbers = max(map(_numbers, groups))
    waste, most_padding = 0.0, 0.0
    for group in groups:
        filled = len(group.layers) * _numbers(group) / group.layers_per_page
        padding = 1 - filled / (group.num_parts * page_numbers)
        most_padding = max(most_padding, padding)
        kept = group.spec.keep_positions
        before_window = 0.0 if kept is None else group.page_positions / (2 * kept)
        waste = max(waste, padding + before_window)
    return most_padding > _MAX_PADDING, waste + _COST_OF_A_PART * sum(group.num_parts for group in groups)


class PageArena:
    """The cache memory of one engine. It starts zeroed, so rows that were never written are finite.

    Args:
        layers: `ModelConfig.attention_layers()`: the main layers, then the MTP heads that draft.
        cache_bytes: The whole budget. On a CPU, pages take physical memory on first use only.
        dtype: Of the stored keys and values.
        page_positions: As in `plan_pages`.
    """

    def __init__(
        self,
        layers: Sequence[AttentionConfig],
        *,
        cache_bytes: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_positions: int = _DEFAULT_PAGE_POSITIONS,
    ):
        self.layout = plan_pages(layers, page_positions, dtype=dtype)
        self.page_bytes = self.layout.page_numbers * dtype.itemsize
        self.num_pages = cache_bytes // self.page_bytes
        if self.num_pages < 1:
            raise ConfigError(
                f"the cache has {cache_bytes:,} bytes, less than one page of {self.page_bytes:,} bytes; give "
                f"cache_gigabytes of at least {_gigabytes(self.page_bytes)}."
            )
        self.dtype = dtype
        self._layers = tuple(layers)
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._references = [0] * self.num_pages
        self.num_seats = 0
        self._free_seats: list[int] = []
        storage = _zeros(self.num_pages, self.layout.page_numbers, dtype, torch.device(device))
        self.place_of_layer = [(0, 0)] * len(layers)  # (group, part)
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = [(storage, storage)] * len(layers)
        for number, group in enumerate(self.layout.groups):
            for place, layer in enumerate(group.layers):
                part, place_in_page = divmod(place, group.layers_per_page)
                self.place_of_layer[layer] = (number, part)
                self._views[layer] = _layer_views(storage, group, place_in_page)
        for layer, spec in enumerate(map(kv_spec, layers)):
            if spec.source_layer is not None:
                self.place_of_layer[layer] = self.place_of_layer[spec.source_layer]
                self._views[layer] = self._views[spec.source_layer]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys [X, P, G, K] and values [X, P, G, V] of a layer, as views of the arena."""
        return self._views[layer]

    @property
    def num_free(self) -> int:
        """Pages with no holder."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with at least one holder."""
        return self.num_pages - len(self._free)

    def take(self) -> int:
        """Takes a free page; its reference count is then 1. The caller ensures that one is free."""
        assert self._free, "a page was taken from an empty list"
        page = self._free.pop()
        assert self._references[page] == 0, f"page {page} is free and held"
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Adds a holder to a held page."""
        assert self._references[page] > 0, f"page {page} is shared, but not held"
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Removes a holder; the page is free once it has none."""
        assert self._references[page] > 0, f"page {page} is released, but not held"
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def take_seat(self) -> int:
        """Takes an index for one sequence's states in the worker. Released indices are reused."""
        if self._free_seats:
            return self._free_seats.pop()
        self.num_seats += 1
        return self.num_seats - 1

    def release_seat(self, seat: int) -> None:
        """Releases the index of a sequence that holds no pages any more."""
        assert seat not in self._free_seats, f"seat {seat} is released twice"
        self._free_seats.append(seat)

    def is_shared(self, page: int) -> bool:
        """Whether the page has more than one holder."""
        return self._references[page] > 1

    def pages_for(self, length: int, margin: int) -> int:
        """Pages that a sequence of `length` positions holds."""
        return sum(
            (group.rows_until(length) - group.first_row_kept(length, margin)) * group.num_parts
            for group in self.layout.groups
        )

    def ideal_bytes(self, length: int) -> int:
        """Bytes of the keys and values that `length` positions need, without rounding up to pages."""
        kept = (kv_spec(layer) for layer in self._layers)
        return sum(
            (length if spec.keep_positions is None else min(length, spec.keep_positions))
            * spec.bytes_per_position(self.dtype.itemsize, scale_bytes=scale_bytes(self.dtype))
            for spec in kept
        )

    def all_global_bytes(self, length: int) -> int:
        """Bytes of `length` positions in a model of full layers (see `all_global_cache_bytes`)."""
        return all_global_cache_bytes(self._layers, length, self.dtype)


def _gigabytes(num_bytes: int) -> str:
    """Return a decimal number of gigabytes that is at least this size."""
    return f"{math.ceil(num_bytes / 1e9 * 1e6) / 1e6:.6f}"


def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros [rows, columns]. On a CPU from NumPy, which takes memory on first use; torch.zeros writes all of it."""
    if device.type == "cpu":
        empty = np.zeros(rows * columns * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(empty).view(dtype).view(rows, columns)
    return torch.zeros(rows, columns, dtype=dtype, device=device)


def _layer_views(storage: torch.Tensor, group: PageGroup, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    pages, page_numbers = storage.shape
    P, G = group.page_positions, group.spec.num_kv_heads
    K, V = group.spec.key_dim + group.scale_numbers, group.spec.value_dim + group.scale_numbers
    start = place * P * G * (K + V)
    keys = storage.as_strided((pages, P, G, K), (page_numbers, G * K, K, 1), start)
    values = storage.as_strided((pages, P, G, V), (page_numbers, G * V, V, 1), start + P * G * K)
    return keys, values


def all_global_cache_bytes(layers: Sequence[AttentionConfig], num_positions: int, dtype: torch.dtype) -> int:
    """Bytes of `num_positions` if all `layers` were full layers of the model (paper table 1).

    In a model without full layers, each layer counts with its own geometry and every position kept.
    """
    owners = [spec for spec in layers if kv_spec(spec).source_layer is None]
    full = next((spec for spec in owners if kv_spec(spec).keep_positions is None), None)
    if full is not None:
        return num_positions * len(layers) * _position_bytes(full, dtype)
    return num_positions * sum(_position_bytes(spec, dtype) for spec in layers)


def _position_bytes(spec: AttentionConfig, dtype: torch.dtype) -> int:
    return kv_spec(spec).bytes_per_position(dtype.itemsize, scale_bytes=scale_bytes(dtype))


class PageTables:
    """The page tables of one sequence: for each group an int32 array [Y, parts] of page numbers, -1 for no page.

    Args:
        margin: Positions before the newest from which the sequence may still run queries (MTP heads lag).

    Attributes:
        seat: Index of the sequence's main-model states and sampling parameters in the worker.
        num_positions: Positions below which every group has rows.
        whole_from: A position from which on all rows have pages, in every group.
    """

    def __init__(self, arena: PageArena, margin: int):
        self._arena = arena
        self._margin = margin
        self.seat = arena.take_seat()
        self._tables = [np.full((_FIRST_TABLE_ROWS, g.num_parts), -1, dtype=np.int32) for g in arena.layout.groups]
        self.num_positions = self.whole_from = 0
        self._first = [0] * len(self._tables)  # rows before it are released
        self._release_length = 0.0  # no row is left behind below this length
        self._stop = [0] * len(self._tables)

    def table(self, group: int) -> np.ndarray:
        """The table of a group, int32 [rows so far, parts]."""
        return self._tables[group][: self._stop[group]]

    def num_rows(self, group: int) -> int:
        """The number of rows of a group's table so far."""
        return self._stop[group]

    def first_row(self, group: int) -> int:
        """The first row of a group's table that may hold pages."""
        return self._first[group]

    @property
    def num_pages(self) -> int:
        """Pages held."""
        return sum(int(np.count_nonzero(table >= 0)) for table in self._held_tables())

    def held(self) -> list[int]:
        """Numbers of the held pages."""
        return [page for table in self._held_tables() for page in table[table >= 0].tolist()]

    def mark_held(self, is_held: np.ndarray) -> None:
        """Sets the entries of the held pages in `is_held`, bool [X]."""
        for table in self._held_tables():
            is_held[table[table >= 0]] = True

    def _held_tables(self) -> list[np.ndarray]:
        return [self.table(group)[first:] for group, first in enumerate(self._first)]

    def missing(self, length: int) -> int:
        """Number of free pages that `reach(length)` needs."""
        count = 0
        for number, group in enumerate(self._arena.layout.groups):
            stop = group.rows_until(length)
            if stop > self._stop[number]:
                first = max(self._stop[number], group.first_row_kept(length, self._margin))
                count += (stop - first) * group.num_parts
        return count

    def reach(self, length: int, *, spare_pages: int = 0) -> None:
        """Takes pages for all positions below `length`.

        Positions that will be before the window of a sliding layer by then get a page only as far as `spare_pages`
        suffice: this sequence does not read them, but another request with the same prefix could.
        """
        for number, group in enumerate(self._arena.layout.groups):
            stop = group.rows_until(length)
            if stop <= self._stop[number]:
                continue
            table = self._grown(number, stop)
            needed = max(self._stop[number], group.first_row_kept(length, self._margin))
            spared = min(needed - self._stop[number], spare_pages // group.num_parts)
            spare_pages -= spared * group.num_parts
            if needed - spared > self._stop[number]:
                self.whole_from = max(self.whole_from, (needed - spared) * group.page_positions)
            for row in range(needed - spared, stop):
                table[row] = [self._arena.take() for _ in range(group.num_parts)]
            self._stop[number] = stop
        self._count_positions()

    def adopt(self, group: int, pages: list[int]) -> None:
        """Fills the empty table of a group with shared pages, row by row (-1: none), and becomes a holder of each."""
        assert self._stop[group] == 0, "only an empty table adopts pages"
        rows = np.asarray(pages, dtype=np.int32).reshape(-1, self._tables[group].shape[1])
        self._grown(group, len(rows))[: len(rows)] = rows
        self._stop[group] = len(rows)
        self.whole_from = max(self.whole_from, len(rows) * self._arena.layout.groups[group].page_positions)
        self._count_positions()
        for page in pages:
            if page >= 0:
                self._arena.share(page)

    def leave_behind(self, length: int) -> None:
        """Releases the pages that a sequence of `length` positions no longer reads."""
        if length < self._release_length:
            return
        self._release_length = length + self._arena.layout.groups[0].page_positions
        next_length = math.inf
        for number, group in enumerate(self._arena.layout.groups):
            if group.spec.keep_positions is None:
                continue
            first = group.first_row_kept(length, self._margin)
            if first > self._first[number]:
                self._release(number, self._first[number], min(first, self._stop[number]))
                self._first[number] = first
                self.whole_from = max(self.whole_from, first * group.page_positions)
            next_row_behind = (first + 1) * group.page_positions + group.spec.keep_positions + self._margin
            next_length = min(next_length, next_row_behind)
        self._release_length = next_length

    def release(self) -> None:
        """Releases all pages and the seat; the tables must not be used afterwards."""
        self._arena.release_seat(self.seat)
        for number in range(len(self._tables)):
            self._release(number, self._first[number], self._stop[number])
            self._first[number] = self._stop[number] = 0

    def _count_positions(self) -> None:
        groups = self._arena.layout.groups
        self.num_positions = min(stop * group.page_positions for stop, group in zip(self._stop, groups, strict=True))

    def _release(self, group: int, first: int, stop: int) -> None:
        if first >= stop:
            return
        rows = self._tables[group][first:stop]
        for page in rows[rows >= 0].tolist():
            self._arena.release(page)
        rows.fill(-1)

    def _grown(self, group: int, num_rows: int) -> np.ndarray:
        table = self._tables[group]
        if num_rows > len(table):
            table = np.full((max(num_rows, 2 * len(table)), table.shape[1]), -1, dtype=np.int32)
            table[: self._stop[group]] = self._tables[group][: self._stop[group]]
            self._tables[group] = table
        return table


class PrefixNode:
    """A node of the prefix tree: one block of tokens and the pages that hold its keys and values.

    Attributes:
        parent: The node of the previous block; None for the root.
        attached: Whether the node is still in the tree.
        tokens: The block, int32 as bytes. The hash of bytes is cached; that of a tuple is computed at each lookup.
        depth: Number of blocks up to and including this one; 0 for the root.
        children: The nodes of the next blocks, by their tokens.
        pages: Pages by group; None where they were released.
        routing: Routed experts of the block, if recorded.
        is_useful: Whether its sliding pages belong to a window at which a request started or a text ended.
        last_use: Time of the last match or insertion, of the node or (after `PrefixCache._pass_on_uses`) a descendant.
    """

    __slots__ = ("attached", "children", "depth", "is_useful", "last_use", "pages", "parent", "routing", "tokens")

    def __init__(self, parent: "PrefixNode | None", tokens: bytes, num_groups: int):
        self.parent = parent
        self.attached = True
        self.tokens = tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[bytes, PrefixNode] = {}
        self.pages: list[array | None] = [None] * num_groups
        self.routing: np.ndarray | None = None
        self.is_useful = False
        self.last_use = 0
