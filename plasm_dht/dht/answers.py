"""What a node says to `find_node` and `find_value`: the closest contacts, and what it holds.

An answer is made of contacts that are encoded already, and is kept for the next who asks the same until the routing
table or the storage changes: a popular name is asked for by everybody.
"""

from collections.abc import Collection

from plasm_dht.clock import Clock
from plasm_dht.dht import wire
from plasm_dht.dht.ids import Address
from plasm_dht.dht.routing import PlasmRoutingTable
from plasm_dht.dht.storage import RecordStorage

# Answers that are kept, of about 1 KiB each.
KEPT = 1024


class Answers:
    """Answers from one node's routing table and storage, encoded."""

    def __init__(self, router: PlasmRoutingTable, storage: RecordStorage, clock: Clock, k: int) -> None:
        self._router = router
        self._storage = storage
        self._clock = clock
        self._k = k
        self._versions = (-1, -1)
        # By key the answer, and the ids that it names.
        self._nodes: dict[bytes, tuple[bytes, Collection[int]]] = {}
        self._found: dict[bytes, tuple[bytes, Collection[int]]] = {}

    def find_node(self, key: bytes, asker: Address) -> bytes:
        """The k live contacts closest to the key, nearest first, as many as fit; the asker itself is left out."""
        kept = self._kept(self._nodes).get(key)
        known = self._router.at(asker)
        if kept is not None and (known is None or known.long_id not in kept[1]):
            return kept[0]
        nearest, named = self._nearest(key, None if known is None else known.long_id)
        answer = wire.nodes_result(list(map(self._router.encoded.__getitem__, nearest)))
        if not named:
            self._nodes[key] = (answer, nearest)
        return answer

    def find_value(self, key: bytes, asker: Address, skip: int) -> bytes:
        """What is held under the key, without the first `skip` envelopes; where nothing is held, as `find_node`."""
        now = wire.time_result(self._clock.wall())
        kept = self._kept(self._found).get(key) if skip == 0 else None
        known = self._router.at(asker)
        if kept is not None and (known is None or known.long_id not in kept[1]):
            return kept[0] + now
        held = self._storage.holdings(key)
        if not held:
            return self.find_node(key, asker)
        nearest, named = self._nearest(key, None if known is None else known.long_id)
        encoded = list(map(self._router.encoded.__getitem__, nearest))
        answer = wire.found_result([holding.envelope for holding in held], encoded, skip)
        if skip == 0 and not named:
            self._found[key] = (answer, frozenset(nearest))
        return answer + now

    def _kept(self, answers: dict[bytes, tuple[bytes, Collection[int]]]) -> dict[bytes, tuple[bytes, Collection[int]]]:
        """The answers that still hold."""
        versions = (self._router.version, self._storage.version)
        if versions != self._versions:
            self._versions = versions
            self._nodes.clear()
            self._found.clear()
        elif len(answers) >= KEPT:
            answers.clear()
        return answers

    def _nearest(self, key: bytes, asker: int | None) -> tuple[list[int], bool]:
        """The ids of the k closest contacts without the asker's, and whether that one was among them."""
        if asker is None:
            return self._router.closest_ids(int.from_bytes(key), self._k), False
        nearest = self._router.closest_ids(int.from_bytes(key), self._k + 1)
        if asker not in nearest:
            return nearest[: self._k], False
        nearest.remove(asker)
        return nearest, True
