"""Prefix cache: requests reuse the keys and values of a common prefix.

A tree of blocks of tokens; a node holds the pages of its block in every group of layers. Sliding layers read only their
last window, so a node without sliding pages still serves as part of a longer prefix. A request can start after a node
only if the tree holds the whole last window of each sliding group there (window of 2 blocks, block 3 is the last):

    block            0    1    2    3
    full pages       x    x    x    x      every block of the prefix
    sliding pages    -    -    x    x      blocks of the window: a request can start after block 3, not after block 2

When requests need the memory of cached pages, the tree evicts the least useful first: sliding pages in the middle of
texts, where no request has started; then, in order of last use, other sliding pages and the full pages of leaves. So
long shared prefixes and the ends of conversations stay longest.

A node also holds the routed experts of its block if they were recorded; a request that needs them starts only after
nodes that have them.
"""

from array import array
from collections.abc import Iterator

from openmimo.engine.cache import PageArena, PrefixNode
from openmimo.engine.request_state import RequestState

_MIN_EVICTED_SHARE = 16  # an eviction frees at least one page per this many nodes, so that scans of the tree stay rare


class PrefixCache:
    """The prefix tree of one arena. The engine clears it when the weights change."""

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
        """Number of pages that only the tree holds."""
        return sum(
            not self._arena.is_shared(page)
            for node in self._nodes()
            for pages in node.pages
            if pages is not None
            for page in pages
        )

    def start(self, sequence: RequestState) -> None:
        """Gives a sequence without pages the longest cached prefix that leaves at least one token to compute."""
        node = self._root
        if sequence.params.reads_whole_prompt:
            path: list[PrefixNode] = []
        else:
            path = self._match(sequence)
        if path:
            node = path[-1]
            self._touch(node)
            self.mark_end(node)
            for number in range(len(self._groups)):
                window = self._blocks_in_window[number]
                pages: list[int] = []
                for block in path if window is None else path[-window:]:
                    block_pages = block.pages[number]
                    assert block_pages is not None, "a prefix without the pages of its window was matched"
                    pages += block_pages
                num_before = self._groups[number].pages_until(len(path) * self._block) - len(pages)
                sequence.held_pages.adopt(number, [-1] * num_before + pages)
            sequence.held_pages.leave_behind(len(path) * self._block)  # whole blocks may be more than a window
            if sequence.params.routed_experts:
                for block in path:
                    assert block.routing is not None, "a prefix without routed experts was matched"
                    sequence.routing.append(block.routing)
        sequence.node = node
        sequence.num_computed_tokens = sequence.states_start = len(path) * self._block
        sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.prompt_length)

    def extend(self, sequence: RequestState) -> None:
        """Adds the blocks that a sequence has completed since the last call."""
        parent = sequence.node
        while parent is not None and (parent.depth + 1) * self._block <= sequence.num_computed_tokens:
            if not parent.attached:
                sequence.node = None
                return
            start = parent.depth * self._block
            tokens = sequence.block(parent.depth, self._block)
            node = parent.children.get(tokens)
            pages = self._pages_of(sequence, start)
            if node is None:
                if any(
                    own is None and window is None for own, window in zip(pages, self._blocks_in_window, strict=True)
                ):
                    sequence.node = None  # a full page is missing: no request could start below
                    return
                node = PrefixNode(parent, tokens, len(self._groups))
                parent.children[tokens] = node
            self._fill(node, pages)
            if sequence.params.routed_experts and node.routing is None:
                node.routing = sequence.routing.between(start, start + self._block)
            self._touch(node)
            sequence.node = parent = node

    def mark_end(self, node: PrefixNode | None) -> None:
        """Records that a prompt or a text ended after this node, where the next turn is likely to start."""
        for _ in range(max((window or 0 for window in self._blocks_in_window), default=0)):
            if node is None:
                return
            node.is_useful = True
            node = node.parent

    def prune(self, node: PrefixNode | None) -> None:
        """Removes the last node of a text if it holds no pages.

        A model of sliding layers only, which reads a text in one pass, leaves such nodes.
        """
        if node is not None and not any(node.pages):
            self._remove_leaf(node)

    def evict(self, num_pages: int) -> None:
        """Frees at least `num_pages` pages, or all that only the tree holds if these are fewer.

        Three passes over the nodes in order of last use, children before parents; each stops at the goal:

        1. Sliding pages of nodes where no request started.
        2. Other sliding pages, and leaves that free pages or hold none.
        3. Pages of inner nodes that pass 2 could not reach, because each leaf below frees nothing:

               A* --- B --- C      *     only the tree holds the page
                 `--- D*           B, C  a running request holds the page too

           Pass 2 removes D. It keeps C, a leaf that frees nothing, so B and A never become leaves. Pass 3 removes C,
           then B, then A, which frees the page of A.
        """
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
        to_remove: set[PrefixNode] = set()  # nodes that hold pages alone, and all nodes below them
        for node in reversed(nodes):
            if node.attached and (node.parent in to_remove or self._holds_alone(node)):
                to_remove.add(node)
        for node in nodes:
            if self._arena.num_free >= goal:
                return
            if node in to_remove:
                self._remove_leaf(node)

    def clear(self) -> None:
        """Releases all pages and removes all nodes."""
        for node in [self._root, *self._nodes()]:
            node.attached = False
            for number in range(len(self._groups)):
                self._release(node, number)
        self._root = PrefixNode(None, b"", len(self._groups))

    def _match(self, sequence: RequestState) -> list[PrefixNode]:
        path: list[PrefixNode] = []
        node = self._root
        for number in range((len(sequence.tokens) - 1) // self._block):
            child = node.children.get(sequence.block(number, self._block))
            if child is None or (sequence.params.routed_experts and child.routing is None):
                break
            path.append(child)
            node = child
        while path and not self._can_start_after(path):
            path.pop()
        return path

    def _can_start_after(self, path: list[PrefixNode]) -> bool:
        return all(
            window is None or all(node.pages[number] is not None for node in path[-window:])
            for number, window in enumerate(self._blocks_in_window)
        )

    def _pages_of(self, sequence: RequestState, start: int) -> list[array | None]:
        """The pages of a block that the tree keeps, by group; None if the sequence lacks one.

        Of sliding layers these are only the pages that a query after the block still reads.
        """
        found: list[array | None] = []
        for number, (group, rows) in enumerate(zip(self._groups, self._rows_a_block, strict=True)):
            stop = (start + self._block) // group.page_positions
            pages = array("i", sequence.held_pages.table(number)[stop - rows : stop].tobytes())
            found.append(None if min(pages) < 0 else pages)
        return found

    def _fill(self, node: PrefixNode, pages_of_groups: list[array | None]) -> None:
        for number, pages in enumerate(pages_of_groups):
            if node.pages[number] is None and pages is not None:
                node.pages[number] = pages
                for page in pages:
                    self._arena.share(page)

    def _touch(self, node: PrefixNode) -> None:
        self._clock += 1
        node.last_use = self._clock

    def _pass_on_uses(self) -> None:
        """Raises the last use of each node to the newest one below it.

        This runs once per eviction. Walking up to the root at each use would cost the square of the length of a text,
        because each of its blocks is used once when it is added.
        """
        for node in reversed(list(self._nodes())):  # children before their parents
            assert node.parent is not None
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
        """Whether the node is the only holder of one of its pages."""
        return any(not self._arena.is_shared(page) for pages in node.pages if pages is not None for page in pages)

    def _remove_leaf(self, node: PrefixNode) -> None:
        """Removes the node if it is a leaf, then each ancestor that becomes a leaf and holds no pages."""
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
