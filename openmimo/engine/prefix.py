"""Reuse of computed prefixes across requests.

A tree of blocks of tokens. A node holds the pages of its block in every group of layers. Sliding layers only ever read
their last window, so a node may have given back their pages and still serve as the beginning of a longer prefix; but a
request can start only after a node where the whole last window of each sliding group is still held.

Pages of nodes are memory that nobody needs just now: when requests need it, the least useful goes first. That is
sliding pages in the middle of a text, where no request has ever started; then, by time of last use, other sliding pages
and the full pages of leaves. So a long shared beginning and the ends of conversations stay, and reuse shrinks step by
step.

Routed experts are kept beside the pages where they were recorded; a request that asks for them starts only after nodes
that have them.
"""

from array import array
from collections.abc import Iterator

from openmimo.engine.cache import PageArena, PrefixNode
from openmimo.engine.request_state import RequestState

_MIN_EVICTED_SHARE = 16  # an eviction frees at least this fraction of what is cached, so that scans stay rare


class PrefixCache:
    """The tree of one arena. It is emptied when the weights change."""

    def __init__(self, arena: PageArena):
        self._arena = arena
        self._groups = arena.layout.groups
        self._block = arena.layout.block_positions
        self._blocks_in_window = [
            None if group.spec.keep_positions is None else -(-group.spec.keep_positions // self._block)
            for group in self._groups
        ]
        self._rows_a_block = [
            self._block // group.page_positions if keep is None else -(-min(keep, self._block) // group.page_positions)
            for group in self._groups
            for keep in [group.spec.keep_positions]
        ]
        self._clock = 0
        self._root = PrefixNode(None, b"", len(self._groups))

    @property
    def num_reclaimable(self) -> int:
        """Pages that only the tree holds."""
        return sum(
            not self._arena.is_shared(page)
            for node in self._nodes()
            for pages in node.pages
            if pages is not None
            for page in pages
        )

    def start(self, sequence: RequestState) -> None:
        """Gives a sequence without pages the longest prefix that it can start after; at least one token is left."""
        node = self._root
        if sequence.params.prompt_logprobs:
            path: list[PrefixNode] = []
        else:
            path = self._match(sequence)
        if path:
            node = path[-1]
            self._touch(node)
            self.mark_end(node)
            for number in range(len(self._groups)):
                window = self._blocks_in_window[number]
                held = path if window is None else path[-window:]
                pages = [page for block in held for page in block.pages[number]]
                behind = [-1] * (self._groups[number].pages_until(len(path) * self._block) - len(pages))
                sequence.pages.adopt(number, behind + pages)
            sequence.pages.leave_behind(len(path) * self._block)  # whole blocks may be more than a window
            if sequence.params.routed_experts:
                for block in path:
                    sequence.routing.append(block.routing)
        sequence.node = node
        sequence.num_computed_tokens = sequence.states_start = len(path) * self._block
        sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.prompt_length)

    def extend(self, sequence: RequestState) -> None:
        """Enters the blocks that a sequence has completed since it was last seen."""
        while sequence.node is not None and (sequence.node.depth + 1) * self._block <= sequence.num_computed_tokens:
            if not sequence.node.attached:
                sequence.node = None
                return
            start = sequence.node.depth * self._block
            tokens = sequence.block(sequence.node.depth, self._block)
            node = sequence.node.children.get(tokens)
            if node is None:
                if not self._holds_all(sequence, start):
                    sequence.node = None  # a full page is missing: nothing below could be started
                    return
                node = PrefixNode(sequence.node, tokens, len(self._groups))
                sequence.node.children[tokens] = node
            self._fill(node, sequence, start)
            self._touch(node)
            sequence.node = node

    def mark_end(self, node: PrefixNode | None) -> None:
        """Notes that a prompt or a text ended after this node: the next turn is likely to start there."""
        for _ in range(max((window or 0 for window in self._blocks_in_window), default=0)):
            if node is None:
                return
            node.is_useful = True
            node = node.parent

    def prune(self, node: PrefixNode | None) -> None:
        """Removes the last node of a text if it holds nothing, as a text read at once by sliding layers alone may."""
        if node is not None and not any(node.pages):
            self._remove_leaf(node)

    def evict(self, num_pages: int) -> None:
        """Frees at least so many pages, if the tree alone holds as many."""
        self._pass_on_uses()
        nodes = sorted(self._nodes(), key=lambda node: (node.last_use, -node.depth))
        goal = self._arena.num_free + max(num_pages, len(nodes) // _MIN_EVICTED_SHARE)
        for node in nodes:
            if self._arena.num_free >= goal:
                return
            if not node.is_useful:
                self._release_sliding(node)
        for node in nodes:
            if self._arena.num_free >= goal:
                return
            self._release_sliding(node)
            if self._holds_alone(node) or not any(node.pages):
                self._remove_leaf(node)
        # Pages above a block that a request shares: the tree lets go of the block first. Parents come last in `nodes`.
        below_own_pages: set[PrefixNode] = set()
        for node in reversed(nodes):
            if node.attached and (node.parent in below_own_pages or self._holds_alone(node)):
                below_own_pages.add(node)
        for node in nodes:
            if self._arena.num_free >= goal:
                return
            if node in below_own_pages:
                self._remove_leaf(node)

    def clear(self) -> None:
        """Gives back everything."""
        for node in [self._root, *self._nodes()]:
            node.attached = False
            for number in range(len(self._groups)):
                self._release(node, number)
        self._root = PrefixNode(None, b"", len(self._groups))

    def _match(self, sequence: RequestState) -> list[PrefixNode]:
        path: list[PrefixNode] = []
        node = self._root
        for number in range((len(sequence.tokens) - 1) // self._block):
            node = node.children.get(sequence.block(number, self._block))
            if node is None or (sequence.params.routed_experts and node.routing is None):
                break
            path.append(node)
        while path and not self._can_start_after(path):
            path.pop()
        return path

    def _can_start_after(self, path: list[PrefixNode]) -> bool:
        return all(
            window is None or all(node.pages[number] is not None for node in path[-window:])
            for number, window in enumerate(self._blocks_in_window)
        )

    def _holds_all(self, sequence: RequestState, start: int) -> bool:
        return all(
            window is not None or self._pages_of(sequence, number, start) is not None
            for number, window in enumerate(self._blocks_in_window)
        )

    def _pages_of(self, sequence: RequestState, number: int, start: int) -> array | None:
        """The pages of a block that the tree keeps: of sliding layers, what a query after the block still reads."""
        stop = (start + self._block) // self._groups[number].page_positions
        pages = array("i", sequence.pages.table(number)[stop - self._rows_a_block[number] : stop].ravel().tobytes())
        return None if min(pages) < 0 else pages

    def _fill(self, node: PrefixNode, sequence: RequestState, start: int) -> None:
        for number in range(len(self._groups)):
            if node.pages[number] is not None:
                continue
            pages = self._pages_of(sequence, number, start)
            if pages is not None:
                node.pages[number] = pages
                for page in pages:
                    self._arena.share(page)
        if sequence.params.routed_experts and node.routing is None:
            node.routing = sequence.routing.between(start, start + self._block).copy()

    def _touch(self, node: PrefixNode) -> None:
        self._clock += 1
        node.last_use = self._clock

    def _pass_on_uses(self) -> None:
        """Gives each node the newest use of itself and everything below it.

        Once for all before an eviction: to walk up to the root at each use would cost the square of the length of a
        text, as each of its blocks is used once when it is entered.
        """
        for node in reversed(list(self._nodes())):  # children before their parents
            node.parent.last_use = max(node.parent.last_use, node.last_use)

    def _release(self, node: PrefixNode, number: int) -> None:
        for page in node.pages[number] or ():
            self._arena.release(page)
        node.pages[number] = None

    def _release_sliding(self, node: PrefixNode) -> None:
        for number, window in enumerate(self._blocks_in_window):
            pages = node.pages[number]
            if window is not None and pages and not all(map(self._arena.is_shared, pages)):
                self._release(node, number)

    def _holds_alone(self, node: PrefixNode) -> bool:
        """Whether a page of the node is nobody else's."""
        return any(not self._arena.is_shared(page) for pages in node.pages if pages is not None for page in pages)

    def _remove_leaf(self, node: PrefixNode) -> None:
        """Removes the node if it is a leaf, and then what only led to it and holds nothing."""
        while node.attached and node.parent is not None and not node.children:
            for number in range(len(self._groups)):
                self._release(node, number)
            del node.parent.children[node.tokens]
            node.attached = False
            node.parent.last_use = max(node.parent.last_use, node.last_use)
            node = node.parent
            if any(node.pages):
                return

    def _nodes(self) -> Iterator[PrefixNode]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())
