"""What a node says to `find_node` and `find_value`: the closest contacts, and what it holds.

An answer is made of contacts that are encoded already, and is kept for the next who asks the same until the routing
table or the storage changes: a popular name is asked for by everybody.
"""

from collections.abc import Collection

from plasm_dht.clock import Clock
from plasm_dht.dht import wire
from plasm_dht.dht.routing import PlasmRoutingTable
from plasm_dht.dht.storage import RecordStorage

# Answers that are kept, of about 1 KiB each.
KEPT = 1024


class Answers:
    """Answers from one node's routing table and storage, encoded.

    `stamp` has to be called when datagrams have arrived, and before they are answered.
    """

    def __init__(self, router: PlasmRoutingTable, storage: RecordStorage, clock: Clock, k: int) -> None:
        self._router = router
        self._storage = storage
        self._clock = clock
        self._k = k
        self._encoded = router.encoded
        self._router_version = self._storage_version = -1
        self._time = b""
        self._monotonic = 0.0
        # By key the answer, the ids that it names, and for what is held until when (monotonic) it holds.
        self._nodes: dict[bytes, tuple[bytes, Collection[int]]] = {}
        self._found: dict[bytes, tuple[bytes, Collection[int], float]] = {}

    def stamp(self) -> None:
        """Note the time, once for all that has arrived."""
        self._time = wire.time_result(self._clock.wall())
        self._monotonic = self._clock.monotonic()

    def find_node(self, key: bytes, asker: int | None) -> bytes:
        """The k live contacts closest to the key, nearest first, as many as fit, without the asker's own id."""
        self._forget_outdated()
        kept = self._nodes.get(key)
        if kept is not None and asker not in kept[1]:
            return kept[0]
        nearest, named = self._nearest(key, asker)
        answer = wire.nodes_result(list(map(self._encoded.__getitem__, nearest)))
        if not named:
            self._nodes[key] = (answer, nearest)
        return answer

    def find_value(self, key: bytes, asker: int | None, skip: int) -> bytes:
        """What is held under the key, without the first `skip` envelopes; where nothing is held, as `find_node`."""
        self._forget_outdated()
        kept = self._found.get(key)
        if kept is not None and skip == 0 and asker not in kept[1] and self._monotonic < kept[2]:
            return kept[0] + self._time
        held = self._storage.holdings(key)
        if not held:
            return self.find_node(key, asker)
        nearest, named = self._nearest(key, asker)
        encoded = list(map(self._encoded.__getitem__, nearest))
        answer = wire.found_result([holding.envelope for holding in held], encoded, skip)
        if skip == 0 and not named:
            self._found[key] = (answer, frozenset(nearest), min(holding.look_at for holding in held))
        return answer + self._time

    def _forget_outdated(self) -> None:
        if self._router.version != self._router_version or self._storage.version != self._storage_version:
            self._router_version, self._storage_version = self._router.version, self._storage.version
            self._nodes.clear()
            self._found.clear()
        elif len(self._nodes) + len(self._found) >= KEPT:
            self._nodes.clear()
            self._found.clear()

    def _nearest(self, key: bytes, asker: int | None) -> tuple[list[int], bool]:
        """The ids of the k closest contacts without the asker's, and whether that one was among them."""
        if asker is None:
            return self._router.closest_ids(int.from_bytes(key), self._k), False
        nearest = self._router.closest_ids(int.from_bytes(key), self._k + 1)
        if asker not in nearest:
            return nearest[: self._k], False
        nearest.remove(asker)
        return nearest, True
