"""The key/value cache: one arena of equal pages, from which layers of every kind draw.

X pages of the arena, P positions a page, G key/value heads, K key dim, V value dim, B sequences, Y rows of a table.

Layers that remember the same (`KVSpec`) form a group and share a page table. Row y of the table covers positions y*P to
y*P + P - 1, with P a power of two. One page holds these positions for a few layers of the group (a part), so a
row names one page for each part:

    group of full layers, P = 32              group of sliding layers, P = 16
    part         0    1    2                  part         0    1    2    3
    layers      0-2  3-5  6-8                 layers      9-14 15-20 ...
    row 0        7   12    3   -> positions   row 0       -1   -1   -1   -1   behind the window: returned
    row 1        8    1    9      32 to 63    row 1        4    5   10   11   positions 16 to 31

`plan_pages` chooses the sizes of the parts such that a page has the same bytes in every group, up to a few percent.
Equal pages are what lets full and sliding layers take memory from one arena in any proportion: nothing splits it
beforehand. Full layers keep all rows; sliding layers return those behind their window. MTP heads lag behind the main
layers, but use the same positions and so the same tables. A layer that reads another layer's keys
(`KVSpec.source_layer`) is in no group: it has no pages and uses those of the other.

Pages are counted by reference, because requests with the same beginning share them (`openmimo.engine.prefix`).
"""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from openmimo.model.attention import KVSpec, kv_spec
from openmimo.model.geometry import AttentionConfig

MIN_PAGE_POSITIONS, MAX_PAGE_POSITIONS = 16, 128
_DEFAULT_PAGE_POSITIONS = 32
_MAX_PADDING = 0.1  # of a page
_COST_OF_A_PART = 0.002  # as a share of the cache: what the host does for one page more a row
_FIRST_TABLE_ROWS = 64


@dataclass(frozen=True)
class PageGroup:
    """Layers that remember the same, and how pages hold them.

    Attributes:
        spec: What one layer remembers.
        layers: The numbers of the layers.
        page_positions: Positions a page, P.
        layers_per_page: Layers of which a page holds these positions; the last part of a group may have fewer.
    """

    spec: KVSpec
    layers: tuple[int, ...]
    page_positions: int
    layers_per_page: int

    @property
    def num_parts(self) -> int:
        """Pages of one table row."""
        return -(-len(self.layers) // self.layers_per_page)

    def first_row_kept(self, length: int, margin: int) -> int:
        """The first table row that a query at position `length` (or up to `margin` before it) still reads."""
        if self.spec.keep_positions is None:
            return 0
        return max(length - self.spec.keep_positions - margin, 0) // self.page_positions

    def rows_until(self, length: int) -> int:
        """How many table rows cover the positions below `length`."""
        return -(-length // self.page_positions)

    def pages_until(self, length: int) -> int:
        """How many pages cover the positions below `length`."""
        return self.rows_until(length) * self.num_parts


@dataclass(frozen=True)
class PageLayout:
    """How an arena is cut.

    Attributes:
        groups: The groups of layers.
        page_numbers: Numbers (keys and values) that a page has room for.
    """

    groups: tuple[PageGroup, ...]
    page_numbers: int

    @property
    def block_positions(self) -> int:
        """The fewest positions that fill whole rows in every group: all are powers of two."""
        return max(group.page_positions for group in self.groups)

    @property
    def pages_per_row(self) -> int:
        """Pages of one row in every group together."""
        return sum(group.num_parts for group in self.groups)


def plan_pages(layers: Sequence[AttentionConfig], page_positions: int = _DEFAULT_PAGE_POSITIONS) -> PageLayout:
    """Groups the layers and splits each group into parts, such that pages have nearly equal bytes.

    Args:
        layers: As in `PageArena`.
        page_positions: Positions a page of layers that keep everything: a power of two from 16 to 128. Sliding layers
            may get fewer, because a window that begins inside a page wastes the rest of it.
    """
    layers_of: dict[KVSpec, list[int]] = {}
    for index, layer in enumerate(layers):
        if kv_spec(layer).source_layer is None:
            layers_of.setdefault(kv_spec(layer), []).append(index)
    choices = [_group_choices(spec, tuple(indices), page_positions) for spec, indices in layers_of.items()]
    groups = min(itertools.product(*choices), key=_waste)
    return PageLayout(groups, max(map(_numbers, groups)))


def _group_choices(spec: KVSpec, layers: tuple[int, ...], page_positions: int) -> list[PageGroup]:
    """Every page of a group that differs in positions or in the number of parts."""
    positions = [page_positions]
    while spec.keep_positions is not None and positions[-1] > MIN_PAGE_POSITIONS:
        positions.append(positions[-1] // 2)
    sizes = sorted({-(-len(layers) // parts) for parts in range(1, len(layers) + 1)})
    return [PageGroup(spec, layers, count, size) for count in positions for size in sizes]


def _numbers(group: PageGroup) -> int:
    return group.layers_per_page * group.page_positions * group.spec.bytes_per_position(1)


def _waste(groups: tuple[PageGroup, ...]) -> tuple[bool, float]:
    """Whether pages have too much padding; then padding and cut-off windows, and the work for many parts."""
    page_numbers = max(map(_numbers, groups))
    waste, most_padding = 0.0, 0.0
    for group in groups:
        filled = len(group.layers) * _numbers(group) / group.layers_per_page
        padding = 1 - filled / (group.num_parts * page_numbers)
        most_padding = max(most_padding, padding)
        kept = group.spec.keep_positions
        cut = 0.0 if kept is None else group.page_positions / (2 * kept)
        waste = max(waste, padding + cut)
    return most_padding > _MAX_PADDING, waste + _COST_OF_A_PART * sum(group.num_parts for group in groups)


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
        page_positions: int = _DEFAULT_PAGE_POSITIONS,
    ):
        self.layout = plan_pages(layers, page_positions)
        self.page_bytes = self.layout.page_numbers * dtype.itemsize
        self.num_pages = cache_bytes // self.page_bytes
        self.dtype = dtype
        self._layers = tuple(layers)
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._references = [0] * self.num_pages
        self.num_seats = 0
        self._free_seats: list[int] = []
        storage = _zeros(self.num_pages, self.layout.page_numbers, dtype, torch.device(device))
        self.place_of_layer = [(0, 0)] * len(layers)  # the number of its group, and its part of that
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
        """The keys [X, P, G, K] and values [X, P, G, V] that a layer reads: views into the arena."""
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
        assert self._free, "a page was taken from an empty list"
        page = self._free.pop()
        assert self._references[page] == 0, f"page {page} is free and held"
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a held page."""
        assert self._references[page] > 0, f"page {page} is shared, but not held"
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One holder fewer; the last one frees the page."""
        assert self._references[page] > 0, f"page {page} is released, but not held"
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def take_seat(self) -> int:
        """A number for one sequence, under which a worker keeps its states; those of ended sequences are reused."""
        if self._free_seats:
            return self._free_seats.pop()
        self.num_seats += 1
        return self.num_seats - 1

    def release_seat(self, seat: int) -> None:
        """The sequence is gone."""
        assert seat not in self._free_seats, f"seat {seat} is released twice"
        self._free_seats.append(seat)

    def is_shared(self, page: int) -> bool:
        """Whether several hold the page."""
        return self._references[page] > 1

    def pages_for(self, length: int, margin: int) -> int:
        """Pages that a sequence of `length` positions holds."""
        return sum(
            (group.rows_until(length) - group.first_row_kept(length, margin)) * group.num_parts
            for group in self.layout.groups
        )

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
    owners = [spec for spec in layers if kv_spec(spec).source_layer is None]
    full = next((spec for spec in owners if kv_spec(spec).keep_positions is None), None)
    if full is not None:
        return num_positions * len(layers) * kv_spec(full).bytes_per_position(dtype.itemsize)
    return num_positions * sum(kv_spec(spec).bytes_per_position(dtype.itemsize) for spec in layers)


class PageTables:
    """Which pages one sequence holds, group by group: int32 arrays [Y, parts] of pages, -1 where none is held.

    margin: how many positions before its newest a sequence may still have to read from (MTP heads lag). seat: where
    a worker keeps main-model states of the sequence.
    """

    def __init__(self, arena: PageArena, margin: int):
        self._arena = arena
        self._margin = margin
        self.seat = arena.take_seat()
        self._tables = [np.full((_FIRST_TABLE_ROWS, g.num_parts), -1, dtype=np.int32) for g in arena.layout.groups]
        self._first = [0] * len(self._tables)  # rows before it were returned
        self._stop = [0] * len(self._tables)

    def table(self, group: int) -> np.ndarray:
        """The table of a group, int32 [rows so far, parts]."""
        return self._tables[group][: self._stop[group]]

    def first_row(self, group: int) -> int:
        """The first row of a group's table that may hold pages."""
        return self._first[group]

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
            stop = group.rows_until(length)
            if stop > self._stop[number]:
                first = max(self._stop[number], group.first_row_kept(length, self._margin))
                count += (stop - first) * group.num_parts
        return count

    def reach(self, length: int, *, spare_pages: int = 0) -> None:
        """Takes the pages for all positions below `length`.

        Positions that sliding layers will have left behind by then get a page only out of `spare_pages`: no query reads
        them, but another request with the same beginning could use them.
        """
        for number, group in enumerate(self._arena.layout.groups):
            stop = group.rows_until(length)
            if stop <= self._stop[number]:
                continue
            table = self._grown(number, stop)
            needed = max(self._stop[number], group.first_row_kept(length, self._margin))
            spared = min(needed - self._stop[number], spare_pages // group.num_parts)
            spare_pages -= spared * group.num_parts
            for row in range(needed - spared, stop):
                table[row] = [self._arena.take() for _ in range(group.num_parts)]
            self._stop[number] = stop

    def adopt(self, group: int, pages: list[int]) -> None:
        """Starts an empty table with pages of others, row by row (-1: none), of which it becomes one more holder."""
        assert self._stop[group] == 0, "a table that is not empty adopts pages"
        rows = np.asarray(pages, dtype=np.int32).reshape(-1, self._tables[group].shape[1])
        self._grown(group, len(rows))[: len(rows)] = rows
        self._stop[group] = len(rows)
        for page in pages:
            if page >= 0:
                self._arena.share(page)

    def leave_behind(self, length: int) -> None:
        """Returns what a sequence of `length` positions no longer reads."""
        for number, group in enumerate(self._arena.layout.groups):
            first = group.first_row_kept(length, self._margin)
            if first > self._first[number]:
                self._release(number, self._first[number], min(first, self._stop[number]))
                self._first[number] = first

    def release(self) -> None:
        """Returns everything; the tables are not used again."""
        self._arena.release_seat(self.seat)
        for number in range(len(self._tables)):
            self._release(number, self._first[number], self._stop[number])
            self._first[number] = self._stop[number] = 0

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
        parent: The node of the block before; None for the root.
        attached: Whether the node is still in the tree.
        tokens: The block, int32 as bytes: the hash of bytes is computed once, that of a tuple at each lookup.
        depth: Blocks before this one.
        children: The nodes of the next blocks, by their tokens.
        pages: Pages by group; None where they were returned to the arena.
        routing: Routed experts of the block, if recorded.
        is_useful: Whether its sliding pages belong to a window at which a request started or a text ended.
        last_use: Time of the last match or insertion; it also counts for the ancestors (`PrefixCache._pass_on_uses`).
    """

    __slots__ = ("attached", "children", "depth", "is_useful", "last_use", "pages", "parent", "routing", "tokens")

    def __init__(self, parent: "PrefixNode | None", tokens: bytes, num_groups: int):
        self.parent = parent
        self.attached = True
        self.tokens = tokens
        self.depth = 0 if parent is None else parent.depth + 1
        self.children: dict[bytes, PrefixNode] = {}
        self.pages: list[array | None] = [None] * num_groups
        self.routing: np.ndarray | None = None
        self.is_useful = False
        self.last_use = 0
