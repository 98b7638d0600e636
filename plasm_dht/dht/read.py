"""Reading a name: at the bound keys of trusted publishers, at the shared key, and what a reading teaches."""

import asyncio
import random
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any

from plasm_dht.clock import Clock, NetworkTime, reader_time
from plasm_dht.dht import density, ids, wire
from plasm_dht.dht.candidate import Candidate
from plasm_dht.dht.find import RecordLookup, live
from plasm_dht.dht.lookup import LOOKUP_TIMEOUT, Asker, Hole, NodeLookup, beyond
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.stats import FOUND, NO_ANSWER, NOT_FOUND
from plasm_dht.identity import parse_publisher_id
from plasm_dht.record import Record, bound_key, check_name, freshest_first, shared_key

# Contacts that say who is near them, so that one liar does not decide how large the network is.
COUNTED = 3
# Neighbours of a contact may be a crowd around a key when this share of them is nearer to it than the contact. One that
# is the nearest itself may be amid 50, of whom the 20 nearest are two bits nearer to it than the key.
MOST, NEAR = 0.75, 2
# Ids of which the one farthest from the keys is looked up: with this many it is far from all keys of four publishers.
PLACES = 16


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
        self._time = NetworkTime(clock)
        self._told: list[Contact] = []  # whom a caller that does not stay knew before its first reading

    def now(self) -> int:
        """Unix ms as the last reading made believe that said anything of it."""
        return self._time.now()

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
            running = [lookup.run(deadline - loop.time()) for lookup in lookups]
            if self._protocol.source_node.id == ids.TRANSIENT_ID:
                await asyncio.gather(self._count_nodes(lookups, pairs, deadline), *running)
            else:
                for lookup, pair in zip(lookups, pairs, strict=True):
                    lookup.count(self._protocol.node_count(*pair))
                await _together(running)
            crowds = ((lookup, lookup.nodes and lookup.crowd(lookup.nodes)) for lookup in lookups)
            await _together([self._look_beyond(lookup, crowd, deadline) for lookup, crowd in crowds if crowd])
            return lookups

        shared = shared_key(name)
        bound = [bound_key(each, name) for each in sorted(publishers)]
        lookups = await look_up([(key, shared) for key in bound])
        # An old record or a tombstone at the bound key may be all that a liar shows: the newest of both keys decides.
        if not self._live(lookups, publishers):
            lookups += await look_up([(shared, bound[0] if bound else shared)])
        self._time.learn([now for lookup in lookups for now in lookup.samples])
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

    async def _look_beyond(self, lookup: RecordLookup, crowd: Hole, deadline: float) -> None:
        """Where attackers crowd around its key, ask those who would hold it if they did not."""
        loop = asyncio.get_running_loop()
        left = deadline - loop.time()
        if lookup.nodes is not None and left > 0:
            rooms = {"k": self._k, "alpha": self._alpha}
            found = await beyond(self._protocol, crowd, lookup.nodes, **rooms, timeout=left, margin=1)
            lookup.forget_samples()  # whoever crowds around a key would be most of those who say what time it is
            await lookup.ask_also(found, deadline - loop.time())

    async def _count_nodes(
        self, lookups: Sequence[RecordLookup], pairs: Sequence[tuple[bytes, bytes]], deadline: float
    ) -> None:
        """Tell each lookup how many nodes there are; `pairs`: its key, and another of the name that may be crowded."""
        keys = {int.from_bytes(key) for pair in pairs for key in pair}
        nodes = await self._ask_count(keys, deadline) if keys else None
        for lookup in lookups:
            lookup.count(nodes)

    async def _ask_count(self, keys: Collection[int], deadline: float) -> float | None:
        """How many nodes there are, for a caller that does not stay and has no neighbours: contacts say who theirs are.

        Where a crowd may be most of these a place far off is looked up. Who was met in a reading may be of a crowd.
        """
        self._told = self._told or self._protocol.router.live()
        near = await self._neighbours([each for each in self._told if not each.is_stale][:COUNTED], deadline)
        apart = [
            (own, nodes)
            for own, nodes in near
            if len(nodes) < self._k or not any(_is_amid(key, own, nodes) for key in keys)
        ]
        if not apart and self._protocol.router.live_count:
            place = max(
                (random.getrandbits(ids.ID_BYTES * 8) for _ in range(PLACES)),
                key=lambda each: min(each ^ key for key in keys),
            )
            census = Census(self._protocol, place.to_bytes(ids.ID_BYTES), k=COUNTED, alpha=self._alpha)
            apart = [(place, nodes) for nodes in await census.take(deadline - asyncio.get_running_loop().time())]
        counts = [
            density.node_count(sorted(each ^ there for each in nodes), [there ^ key for key in keys], self._k)
            for there, nodes in apart
        ]
        known = sorted(count for count in counts if count is not None)
        return known[len(known) // 2] if known else None

    async def _neighbours(self, contacts: Iterable[Contact], deadline: float) -> list[tuple[int, list[int]]]:
        """The id of each of the contacts that answer in time, and those of its neighbours."""
        asked = {self._protocol.call_find_node(each, each): each.long_id for each in contacts}
        if asked:
            await asyncio.wait(asked, timeout=max(deadline - asyncio.get_running_loop().time(), 0))
        return [
            (own, [int.from_bytes(node.id) for node in found.nodes])
            for each, own in asked.items()
            if each.done() and (found := each.result()[1]) is not None
        ]


class Census(NodeLookup):
    """Finds the k nodes closest to a place, and who is near it by the word of each."""

    def __init__(self, protocol: Asker, key: bytes, *, k: int, alpha: int) -> None:
        super().__init__(protocol, key, k=k, alpha=alpha)
        self._named: dict[ids.Address, list[int]] = {}

    def receive(self, candidate: Candidate, found: wire.Found) -> bool:
        """Note whom it names: the closest need not be asked again who is near."""
        self._named[candidate.contact.address] = [int.from_bytes(node.id) for node in found.nodes]
        return False

    async def take(self, timeout: float) -> list[list[int]]:
        """The ids that each of the closest named, and its own."""
        return [[each.long_id, *self._named[each.address]] for each in await self.run(timeout)]


async def _together(running: Sequence[Coroutine[Any, Any, Any]]) -> None:
    """Run all at once; one alone, as in most readings, without a task of its own, which takes a turn of the loop."""
    if len(running) == 1:
        await running[0]
    elif running:
        await asyncio.gather(*running)


def _is_amid(key: int, own: int, nodes: Collection[int]) -> bool:
    """Whether most of a node's neighbours are nearer to a key than itself, and it is about as near to it as to them.

    So they are where they are a crowd around the key.
    """
    is_near = any((each ^ own).bit_length() + NEAR >= (key ^ own).bit_length() for each in nodes)
    return is_near and sum(each ^ key < own ^ key for each in nodes) >= MOST * len(nodes)
