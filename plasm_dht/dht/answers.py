"""What a node says to `find_node` and `find_value`: the closest contacts, and what it holds.

The closest contacts are kept, encoded, for all keys that have the same ones in the same order, until the routing table
changes. An answer that shows what is held is kept when it is asked for again, until that or what is held under its key
changes: a popular name is asked for by everybody.
"""

from collections.abc import Collection
from operator import attrgetter
from typing import NamedTuple, TypeAlias

from plasm_dht.clock import Clock
from plasm_dht.dht import wire
from plasm_dht.dht.routing import ALL_BITS, PlasmRoutingTable
from plasm_dht.dht.storage import RecordStorage

# Answers that are kept, of about 1 KiB each, and keys of which is known that they were asked for.
KEPT = 1024
# Lists of the closest contacts that are kept, of some 1.3 KiB each (with IPv6 1.7). A table of 400 contacts has some
# 7,000 to 14,000.
NEAREST_KEPT = 8192

_LOOK_AT = attrgetter("look_at")

# A result without the time at its end, whom it names, and until when it holds (monotonic).
Found: TypeAlias = tuple[bytes, Collection[bytes], float]


class Nearest(NamedTuple):
    """The k closest contacts, and whoever comes next, or nobody."""

    nodes: wire.Nodes
    following: tuple[bytes, ...]


class Answers:
    """Answers from one node's routing table and storage, encoded as whole datagrams.

    An asker is given as the wire names it, as it would stand in the answer; who is no contact is no bytes.

    `stamp` has to be called when datagrams have arrived and before they are answered, and `forget_outdated` after what
    may have changed the table meanwhile.
    """

    def __init__(self, router: PlasmRoutingTable, storage: RecordStorage, clock: Clock, k: int) -> None:
        self._router = router
        self._storage = storage
        self._clock = clock
        self._k = k
        self._router_version = -1
        self._nearest: dict[int, Nearest] = {}  # by what is alike in all their keys
        self._time = b""
        self._monotonic = 0.0
        self._found: dict[bytes, Found] = {}
        self._found_for: dict[bytes, dict[bytes, Found]] = {}  # by whom it must not name
        self._made = 0
        self._asked: set[bytes] = set()
        storage.on_shelved = self._forget_found

    def stamp(self) -> None:
        """Note the time, once for all that has arrived."""
        self._time = wire.time_result(self._clock.wall())
        self._monotonic = self._clock.monotonic()
        self.forget_outdated()

    def forget_outdated(self) -> None:
        """Forget all answers if the routing table has changed."""
        if self._router.version != self._router_version:
            self._router_version = self._router.version
            self._nearest.clear()
            self._forget()

    def find_node(self, message_id: bytes, key: bytes, asker: bytes) -> bytes:
        """The k live contacts closest to the key, nearest first, as many as fit, without the asker."""
        return b"".join((wire.RESPONSE, message_id, self._near(key, asker)[0].array))

    def find_value(self, message_id: bytes, key: bytes, asker: bytes, skip: int = 0) -> bytes:
        """What is held under the key, without the first `skip` envelopes; where nothing is held, as `find_node`."""
        kept = self._found.get(key)
        if kept is None or asker in kept[1]:
            kept = self._found_for.get(key, {}).get(asker)
        if kept is None or skip or self._monotonic >= kept[2]:
            kept = self._held_under(key, asker, skip)
        if kept is None:
            return self.find_node(message_id, key, asker)
        return b"".join((wire.RESPONSE, message_id, kept[0], self._time))

    def _held_under(self, key: bytes, asker: bytes, skip: int) -> Found | None:
        held = self._storage.holdings(key)
        if not held:
            return None
        nodes, is_named = self._near(key, asker)
        result = wire.found_result([holding.envelope for holding in held], nodes, skip)
        if key not in self._asked:  # of many names most are asked for once: to keep that takes as long as to answer
            if len(self._asked) >= KEPT:
                self._asked.clear()
            self._asked.add(key)
            return result, (), 0.0
        made = result, frozenset(nodes.names), min(map(_LOOK_AT, held))
        if not skip:
            self._make_room()
            if is_named:  # the answer of the key itself names it, and must not
                self._found_for.setdefault(key, {})[asker] = made
            else:
                self._found[key] = made
        return made

    def _make_room(self) -> None:
        if self._made == KEPT:
            self._forget()
        self._made += 1

    def _forget(self) -> None:
        self._made = 0
        self._found.clear()
        self._found_for.clear()

    def _forget_found(self, key: bytes) -> None:
        self._found.pop(key, None)
        self._found_for.pop(key, None)

    def _near(self, key: bytes, asker: bytes) -> tuple[wire.Nodes, bool]:
        """The k closest contacts without the asker, and whether that one was among them."""
        wanted = int.from_bytes(key)
        bits = self._router.deciding_bits(wanted)
        nearest = self._nearest.get(wanted & bits)
        if nearest is None:
            names = tuple([contact.encoded for contact in self._router.closest(wanted, self._k + 1)])
            nearest = Nearest(wire.Nodes.of(names[: self._k]), names[self._k :])
            if bits != ALL_BITS and len(self._nearest) < NEAREST_KEPT:
                self._nearest[wanted & bits] = nearest
        nodes = nearest.nodes
        if asker not in nodes.names:
            return nodes, False
        return wire.Nodes.of([name for name in (*nodes.names, *nearest.following) if name != asker]), True
