"""The closest contacts to any key, encoded as they are handed out, and kept until somebody comes or goes.

Which contacts are the k closest to a key is decided by few of its bits. What was looked up once stands at the end of a
path through these bits, so that all keys that are alike in them find it there. A table of n contacts whose ids are
random has some 2n of these sets, and many times as many orders in which they are from a key. So they are handed out in
no order: whoever asks knows the key and the ids.
"""

from typing import NamedTuple, TypeAlias, final

from plasm_dht.dht import wire
from plasm_dht.dht.ids import ID_BYTES
from plasm_dht.dht.routing import PlasmRoutingTable

# Sets that are kept, of some 4 KiB each, and forks on the way to them.
MAX_KEPT = 4096
# The bits of a key's first byte, by which its path is found without a step for each.
FIRST = range(ID_BYTES * 8 - 8, ID_BYTES * 8)


class Nearest(NamedTuple):
    """The closest contacts as the wire names them, the array of them, and who comes next, or nobody."""

    names: frozenset[bytes]
    array: bytes
    following: tuple[bytes, ...]


@final
class Fork:
    """Where a bit of the key decides: what is known of the keys without it, and of those with it."""

    __slots__ = ("byte", "mask", "sides")

    def __init__(self, bit: int) -> None:
        self.byte = ID_BYTES - 1 - bit // 8
        self.mask = 1 << bit % 8
        self.sides: dict[int, Place] = {}


Place: TypeAlias = "Fork | Nearest | None"


class NearestSets:
    """The k live contacts of a routing table that are closest to a key, or as many of the nearest as fit a datagram.

    Whoever of the k does not fit makes no room by being the asker.
    """

    def __init__(self, router: PlasmRoutingTable, k: int) -> None:
        self._router = router
        self._k = k
        self.forget()

    def forget(self) -> None:
        """The table has changed."""
        self._by_first_byte: dict[int, Place] = {}
        self.count = 0  # sets and forks

    def to(self, key: bytes) -> Nearest:
        """Those closest to the key."""
        place = self._by_first_byte.get(key[0])
        while type(place) is Fork:
            place = place.sides.get(key[place.byte] & place.mask)
        return self._look_up(key) if place is None else place

    def array_without(self, key: bytes, asker: bytes) -> bytes:
        """The array of those that are closest to the key without this one of them."""
        nearest = self.to(key)
        # In an order that is the same in every process. Whoever comes next is left out where that one does not fit.
        names = [*sorted(nearest.names - {asker}), *nearest.following]
        if len(names) < min(self._k, self._router.live_count - 1):  # others may fit where the asker did
            names = self.in_order(key, asker)
        return wire.nodes_array(names)

    def in_order(self, key: bytes, asker: bytes) -> list[bytes]:
        """The k closest contacts without the asker, nearest first, whether they fit or not."""
        names = [contact.encoded for contact in self._router.closest(int.from_bytes(key), self._k + 1)]
        return [name for name in names if name != asker][: self._k]

    def _look_up(self, key: bytes) -> Nearest:
        wanted = int.from_bytes(key)
        fit, most = 0, self._k  # so many fit a datagram, and more than so many do not
        count = most
        while fit < most:
            near, following, bits = self._router.nearest(wanted, count)
            names = [contact.encoded for contact in near]
            if wire.fit(names):
                fit = count
                after = tuple([contact.encoded for contact in following])
                nearest = Nearest(frozenset(names), wire.nodes_array(names), after)
                path = bits  # keys that share it share who comes next, too: for none of them that one fits
            else:
                most = count - 1
            count = (fit + most + 1) // 2
        if self.count < MAX_KEPT:
            self._keep(key, path, nearest)
        return nearest

    def _keep(self, key: bytes, path: list[int], nearest: Nearest) -> None:
        sides, side = self._by_first_byte, key[0]
        for bit in dict.fromkeys(path):
            if bit in FIRST:
                continue
            fork = sides.get(side)
            if not isinstance(fork, Fork):
                fork = sides[side] = Fork(bit)
                self.count += 1
            sides, side = fork.sides, key[fork.byte] & fork.mask
        sides[side] = nearest
        self.count += 1
