"""KV pages: allocate, share by prefix, free. Bookkeeping only: no tensor is touched here.

A page holds the keys and values of PAGE_TOKENS tokens of one sequence, in every layer of a group. A
full page of a prompt is shared by all sequences of one owner that begin with the same tokens, found
through a trie of page contents: a key is the parent's node and the page's own tokens, so two
prompts never meet by a hash collision. Pages that nobody uses keep their content until they are
needed, the one used least recently goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence as List
from dataclasses import dataclass

from service.engine.sequence import Sequence
from service.placement import kv

# Where a page stands in the trie: its parent, or for a first page the owner, since what one owner
# said must not be found, by its speed, by another.
Node = int | str


@dataclass(frozen=True)
class Group:
    """Layers that keep the same tokens, and how many pages they have in common.

    pages: without the scratch page. ring: most pages of one sequence; beyond, its oldest page is
    written again (a sliding window). None: one page for every PAGE_TOKENS tokens.
    """

    pages: int
    ring: int | None = None


@dataclass(eq=False)
class PageHold:
    """The pages of one sequence. tables: per group the physical page of each logical one."""

    tables: tuple[list[int], ...]
    registered: int = 0
    node: Node = ""


class _Pool:
    """The pages of one group: free, cached (content kept, used by nobody) or used."""

    def __init__(self, group: Group) -> None:
        self.total = group.pages
        self.ring = group.ring
        self.free = list(range(group.pages - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.users = [0] * group.pages

    @property
    def available(self) -> int:
        return len(self.free) + len(self.cached)

    def wanted(self, tokens: int) -> int:
        """Distinct pages that `tokens` tokens of one sequence lie on."""
        count = kv.pages(tokens)
        return count if self.ring is None else min(count, self.ring)


class Pages:
    """The pages of all groups. Called with the engine's lock held, like the scheduler."""

    def __init__(self, groups: List[Group]) -> None:
        """Prefixes are shared if every layer keeps all tokens, that is, if no group is a ring."""
        self._pools = tuple(_Pool(group) for group in groups)
        self._shares = all(group.ring is None for group in groups) and len(groups) == 1
        self._nodes: dict[tuple[Node, tuple[int, ...]], tuple[int, int]] = {}  # -> node, page
        self._keys: dict[int, tuple[Node, tuple[int, ...]]] = {}  # page -> its key in _nodes
        self._last_node = 0
        self._holders: set[Sequence] = set()
        self.prefix_tokens = 0

    @property
    def used_tokens(self) -> int:
        """Room for tokens in pages that sequences hold, in the group where it is largest."""
        used = max((pool.total - pool.available for pool in self._pools), default=0)
        return used * kv.PAGE_TOKENS

    def admit(self, sequence: Sequence) -> bool:
        """Take pages for all tokens the sequence has; set `computed` to those found computed.

        False, and nothing is taken, if there are not enough, counting one more for each sequence
        that will still grow: it would be made to give way at once.
        """
        found = self._prefix(sequence)
        known = sequence.known
        for pool, growing in zip(self._pools, self._growing(), strict=True):
            reused = sum(pool.users[page] == 0 for page in found)
            if pool.available - reused < pool.wanted(known) - len(found) + growing:
                return False
        hold = PageHold(tuple([] for _ in self._pools), len(found), sequence.owner)
        for page in found:
            self._use(self._pools[0], page)
            hold.tables[0].append(page)
            hold.node = self._nodes[self._keys[page]][0]
        sequence.hold = hold
        self._holders.add(sequence)
        sequence.computed = len(found) * kv.PAGE_TOKENS
        self.prefix_tokens += sequence.computed
        self._extend(hold, known)
        return True

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; False, and nothing is taken, if there is none."""
        hold = _hold(sequence)
        for pool, table in zip(self._pools, hold.tables, strict=True):
            if pool.wanted(tokens) - pool.wanted(len(table) * kv.PAGE_TOKENS) > pool.available:
                return False
        self._extend(hold, tokens)
        return True

    def computed(self, sequence: Sequence) -> None:
        """Let others find the pages that have become full. Call it after `computed` has grown."""
        if not self._shares:
            return
        hold = _hold(sequence)
        full = sequence.computed // kv.PAGE_TOKENS
        for index in range(hold.registered, full):
            start = index * kv.PAGE_TOKENS
            key = (hold.node, sequence.ids(start, start + kv.PAGE_TOKENS))
            if key not in self._nodes:
                self._last_node += 1
                page = hold.tables[0][index]
                self._nodes[key] = (self._last_node, page)
                self._keys[page] = key
            hold.node = self._nodes[key][0]
        hold.registered = max(hold.registered, full)

    def free(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Give the pages back; does nothing if it has none. failed: nobody is to find them."""
        hold = sequence.hold
        if not isinstance(hold, PageHold):
            return
        sequence.hold = None
        self._holders.discard(sequence)
        for pool, table in zip(self._pools, hold.tables, strict=True):
            own = table if pool.ring is None else table[: pool.ring]
            # the last pages first: they are of use only together with those before them
            for page in reversed(own):
                pool.users[page] -= 1
                if failed:
                    self._forget(page)
                if pool.users[page] == 0:
                    if page in self._keys:
                        pool.cached[page] = None
                    else:
                        pool.free.append(page)

    def _growing(self) -> list[int]:
        """Per group, how many sequences will want another page."""
        counts = [0] * len(self._pools)
        for sequence in self._holders:
            most = len(sequence.prompt) + sequence.params.max_tokens
            for index, table in enumerate(_hold(sequence).tables):
                pool = self._pools[index]
                counts[index] += pool.wanted(len(table) * kv.PAGE_TOKENS) < pool.wanted(most)
        return counts

    def _prefix(self, sequence: Sequence) -> list[int]:
        """Pages that hold the start of the sequence, but never its last known token, whose logits
        are wanted.
        """
        found: list[int] = []
        if not self._shares or sequence.params.prompt_logprobs is not None:
            return found
        node: Node = sequence.owner
        for index in range((sequence.known - 1) // kv.PAGE_TOKENS):
            start = index * kv.PAGE_TOKENS
            entry = self._nodes.get((node, sequence.ids(start, start + kv.PAGE_TOKENS)))
            if entry is None:
                break
            node, page = entry
            found.append(page)
        return found

    def _extend(self, hold: PageHold, tokens: int) -> None:
        for pool, table in zip(self._pools, hold.tables, strict=True):
            while len(table) * kv.PAGE_TOKENS < tokens:
                if pool.ring is not None and len(table) >= pool.ring:
                    table.append(table[len(table) - pool.ring])
                else:
                    table.append(self._take(pool))

    def _take(self, pool: _Pool) -> int:
        if pool.free:
            page = pool.free.pop()
        else:
            page, _ = pool.cached.popitem(last=False)
            self._forget(page)
        pool.users[page] = 1
        return page

    def _use(self, pool: _Pool, page: int) -> None:
        pool.users[page] += 1
        pool.cached.pop(page, None)

    def _forget(self, page: int) -> None:
        key = self._keys.pop(page, None)
        if key is not None:
            del self._nodes[key]


def _hold(sequence: Sequence) -> PageHold:
    if not isinstance(sequence.hold, PageHold):
        raise RuntimeError(f"sequence {sequence.id} holds no pages")
    return sequence.hold
