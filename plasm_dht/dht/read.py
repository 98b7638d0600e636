"""Reading a name: at the bound keys of trusted publishers, at the shared key, and what a reading teaches."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence

from plasm_dht.clock import Clock, reader_time
from plasm_dht.dht import density, ids
from plasm_dht.dht.find import RecordLookup, live
from plasm_dht.dht.lookup import LOOKUP_TIMEOUT, NodeLookup, beyond
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.stats import FOUND, NO_ANSWER, NOT_FOUND
from plasm_dht.identity import parse_publisher_id
from plasm_dht.record import Record, bound_key, check_name, freshest_first, shared_key

# Contacts, at most, that a caller has who knows those only that it was told of: they say how large the network is.
COUNTED = 3
# It is asked again after this long (s).
COUNT_AGAIN = 3600.0


class Reader:
    """Finds the live records of names.

    `repair(pairs, key)` is told whom to send which newer record under the key.
    """

    def __init__(
        self,
        protocol: PlasmProtocol,
        clock: Clock,
        *,
        k: int,
        alpha: int,
        repair: Callable[[Iterable[tuple[Contact, Record]], bytes], None],
    ) -> None:
        self._protocol = protocol
        self._clock = clock
        self._k = k
        self._alpha = alpha
        self._repair = repair
        self._ahead = 0
        self._nodes: float | None = None  # as a caller that does not stay has counted them
        self._count_again = 0.0

    def now(self) -> int:
        """Unix ms as the last reading made believe: the network's time where our own clock is wrong."""
        return self._clock.now() + self._ahead

    async def find(
        self, name: str, *, quorum: int | None, trust: Sequence[str] | None, timeout: float | None
    ) -> list[Record]:
        """Every publisher's live record (in `trust`, if given), freshest first.

        Ends once `quorum` holders agree on the first (`None`: when all closest have answered), or after `timeout` s.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        publishers = frozenset(parse_publisher_id(publisher) for publisher in trust or ())
        lookups = await self.look_up(check_name(name), publishers, quorum=quorum, timeout=timeout)
        records = self._live(lookups, publishers)
        answered = any(lookup.answered() for lookup in lookups)
        result = FOUND if records else NOT_FOUND if answered else NO_ANSWER
        self._protocol.stats.readings[result].add(loop.time() - started)
        return records

    async def look_up(
        self, name: str, publishers: frozenset[bytes], *, quorum: int | None = None, timeout: float | None = None
    ) -> list[RecordLookup]:
        """As `find`, all that was shown under each of the keys: what is live, tombstones, and what is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (LOOKUP_TIMEOUT if timeout is None else timeout)
        silent: set[ids.Address] = set()  # a stranger that has died is waited for once, not for each key

        async def look_up(pairs: Sequence[tuple[bytes, bytes]]) -> list[RecordLookup]:
            lookups = [
                RecordLookup(self._protocol, key, k=self._k, alpha=self._alpha, quorum=quorum, trust=publishers)
                for key, _ in pairs
            ]
            for lookup in lookups:
                lookup.silent = silent
            counting = self._count_nodes(lookups, pairs, deadline)
            await asyncio.gather(counting, *(lookup.run(deadline - loop.time()) for lookup in lookups))
            await asyncio.gather(*(self._look_beyond(lookup, deadline) for lookup in lookups))
            return lookups

        shared = shared_key(name)
        bound = [bound_key(each, name) for each in sorted(publishers)]
        lookups = await look_up([(key, shared) for key in bound])
        # An old record or a tombstone at the bound key may be all that a liar shows: the newest of both keys decides.
        if not self._live(lookups, publishers):
            lookups += await look_up([(shared, bound[0] if bound else shared)])
        self._ahead = self._now(lookups) - self._clock.now()
        for lookup in lookups:
            if outdated := lookup.outdated():
                self._repair(outdated, lookup.target.id)
        return lookups

    def _now(self, lookups: Iterable[RecordLookup]) -> int:
        """The time (Unix ms) by all that responded to one reading."""
        return reader_time([now for lookup in lookups for now in lookup.samples], self._clock.now())

    def _live(self, lookups: Iterable[RecordLookup], publishers: frozenset[bytes]) -> list[Record]:
        """Each publisher's newest record under any of the keys, if it is live, freshest first."""
        newest: dict[bytes, Record] = {}
        for record in (each for lookup in lookups for each in lookup.winners.values()):
            if record.public_key not in newest or record.rank > newest[record.public_key].rank:
                newest[record.public_key] = record
        now = self._now(lookups)
        ended = {record.envelope for lookup in lookups for record in lookup.ended()}
        records = [record for record in newest.values() if record.envelope not in ended]
        return freshest_first(live(records, now, publishers))

    async def _look_beyond(self, lookup: RecordLookup, deadline: float) -> None:
        """Where attackers crowd around its key, ask those who would hold it if they did not."""
        loop = asyncio.get_running_loop()
        crowd = None if lookup.nodes is None else lookup.crowd(lookup.nodes)
        left = deadline - loop.time()
        if lookup.nodes is not None and crowd is not None and left > 0:
            rooms = {"k": self._k, "alpha": self._alpha}
            found = await beyond(self._protocol, crowd, lookup.nodes, **rooms, timeout=left, margin=1)
            lookup.samples.clear()  # whoever crowds around a key would be most of those who say what time it is
            await lookup.ask_also(found, deadline - loop.time())

    async def _count_nodes(
        self, lookups: Sequence[RecordLookup], pairs: Sequence[tuple[bytes, bytes]], deadline: float
    ) -> None:
        """Tell each lookup how many nodes there are; `pairs`: its key, and another of the name that may be crowded."""
        if self._protocol.source_node.id != ids.TRANSIENT_ID:
            for lookup, pair in zip(lookups, pairs, strict=True):
                lookup.count(self._protocol.node_count(*pair))
            return
        if lookups and (self._nodes is None or self._clock.monotonic() >= self._count_again):
            keys = {int.from_bytes(key) for pair in pairs for key in pair}
            self._nodes = await self._ask_count(keys, deadline)
            self._count_again = self._clock.monotonic() + COUNT_AGAIN
        for lookup in lookups:
            lookup.count(self._nodes)

    async def _ask_count(self, keys: Iterable[int], deadline: float) -> float | None:
        """How many nodes there are, for a caller that does not stay and has no neighbours: contacts say who theirs are.

        If none of these is far from the keys, or we have met others, who may be a crowd, a random place is looked up.
        """
        contacts = self._protocol.router.live()
        near = await self._neighbours(contacts, deadline) if len(contacts) <= COUNTED else {}
        places = [
            distances
            for own, distances in near.items()
            if distances and distances[-1].bit_length() < min(own ^ key for key in keys).bit_length()
        ]
        if not places and (not near or any(len(distances) >= self._k // 2 for distances in near.values())):
            anywhere = NodeLookup(self._protocol, random.randbytes(ids.ID_BYTES), k=self._k, alpha=self._alpha)
            await anywhere.run(deadline - asyncio.get_running_loop().time())
            places = [[each.distance for each in anywhere.answered()]]
        counts = (density.node_count(distances, [0], self._k) for distances in places)
        known = sorted(count for count in counts if count is not None)
        return known[len(known) // 2] if known else None

    async def _neighbours(self, contacts: Iterable[Contact], deadline: float) -> dict[int, list[int]]:
        """How near to each of the contacts that answer in time its neighbours are, nearest first."""
        asked = {self._protocol.call_find_node(each, each): each.long_id for each in contacts}
        if asked:
            await asyncio.wait(asked, timeout=max(deadline - asyncio.get_running_loop().time(), 0))
        return {
            own: sorted(int.from_bytes(node.id) ^ own for node in found.nodes)
            for each, own in asked.items()
            if each.done() and (found := each.result()[1]) is not None
        }
