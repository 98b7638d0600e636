"""What a node says to `find_node` and `find_value`: the closest contacts, and what it holds.

An answer that shows what is held is kept until that, or what is held under its key, or the routing table changes: a
popular name is asked for by everybody.
"""

from collections.abc import Collection
from operator import attrgetter
from typing import TypeAlias

from plasm_dht.clock import Clock
from plasm_dht.dht import wire
from plasm_dht.dht.nearest import NearestSets
from plasm_dht.dht.routing import PlasmRoutingTable
from plasm_dht.dht.storage import RecordStorage

# Answers that are kept, of some 1.3 KiB each, and 2 KiB more where the set of the closest contacts is not kept.
KEPT = 4096

_LOOK_AT = attrgetter("look_at")

# A result without the time at its end, whom it names, and until when it holds (monotonic).
Found: TypeAlias = tuple[bytes, Collection[bytes], float]


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
        self._router_version = -1
        self._nearest = NearestSets(router, k)
        self._time = b""
        self._monotonic = 0.0
        self._found: dict[bytes, Found] = {}
        self._found_for: dict[bytes, dict[bytes, Found]] = {}  # by whom it must not name
        self._made = 0
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
            self._nearest.forget()
            self._forget()

    def find_node(self, message_id: bytes, key: bytes, asker: bytes) -> bytes:
        """The k live contacts closest to the key without the asker, as many as fit."""
        nearest = self._nearest.to(key)
        array = nearest.array if asker not in nearest.names else self._nearest.array_without(key, asker)
        return b"".join((wire.RESPONSE, message_id, array))

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
        nearest = self._nearest.to(key)
        is_named = asker in nearest.names
        array = self._nearest.array_without(key, asker) if is_named else nearest.array
        names: Collection[bytes] = nearest.names
        result = wire.found_alone(held[0].envelope, array) if len(held) == 1 and not skip else None  # nearly always
        if result is None:
            names = self._nearest.in_order(key, asker)
            result = wire.found_result([holding.envelope for holding in held], names, skip)
        made = result, names, min(map(_LOOK_AT, held))
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
