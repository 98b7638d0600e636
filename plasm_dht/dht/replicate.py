"""What a holder owes others: hand-off to closer nodes, replication, repair. Always the same bytes, never a longer life.

A holder that received a record within the last hour does not replicate it again; with a tombstone, or a record that
replaced a different one which may still be alive somewhere, the last ten minutes: so a healed partition converges.
"""

import asyncio
import logging
import random
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from plasm_dht.clock import Clock
from plasm_dht.dht import ids, wire
from plasm_dht.dht.due import DueLoop, DueQueue
from plasm_dht.dht.holding import Holding
from plasm_dht.dht.ids import Address
from plasm_dht.dht.lookup import NodeLookup
from plasm_dht.dht.order import TimedKeys
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.stats import counted
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.record import Record

log = logging.getLogger(__name__)

# A record that was received this long ago is replicated (s; the paper, section 2.5), a tombstone or a change sooner, so
# that everybody has it within 11 minutes of a healed partition (contract, "Life of a record", 5).
EVERY, EVERY_CONTESTED = 3600.0, 600.0
# All holders got it at the same moment: the first to replicate spares the others (s).
SPREAD, SPREAD_CONTESTED = 600.0, 30.0
# A newcomer is given its records after this long (s), when both tables have settled.
HAND_OFF_AFTER = 1.0
# Newcomers that wait for it, at most. Who does not answer holds up those behind it, and whoever says another id at each
# ping is new each time; who finds no room is given its records by the next replication.
MAX_NEWCOMERS = 1000
# Replications and hand-offs under way at once, and records of one hand-off under way at once.
LIMIT = 4
SLICE = 16
# Keys that a hand-off looks at before the loop turns: the closest of each take about 30 us to find.
LOOKED_AT = 64
# The wall clock only matters to whoever signs: replication need not look at it often (s).
LOOK_AGAIN = 600.0

Job = tuple[bytes, bytes]  # key, public key


class Replications(DueLoop[Job]):
    """When each holding is to be passed on: a `DueQueue` of a million would take 300 bytes a record.

    The time is in the holding, its place in the order here.
    """

    def __init__(self, storage: RecordStorage, clock: Clock) -> None:
        super().__init__(clock, look_again=LOOK_AGAIN)
        self._storage = storage
        self._order = TimedKeys()

    def __len__(self) -> int:
        return len(self._order)

    def schedule(self, key: bytes, holding: Holding, delay: float) -> None:
        """Make what is held due in `delay` seconds, whenever it was due before."""
        self.cancel(key, holding)
        at = holding.replicate_at = self._clock.elapsed() + delay
        self._order.schedule(at, key)
        self._scheduled(at)

    def cancel(self, key: bytes, holding: Holding) -> None:
        """Forget it."""
        if holding.replicate_at is not None:
            self._order.cancel(holding.replicate_at, key)
            holding.replicate_at = None

    def _soonest(self) -> float | None:
        soonest = self._order.soonest()
        return None if soonest is None else soonest[0]

    def _take(self) -> Job:
        soonest = self._order.soonest()
        assert soonest is not None  # noqa: S101  # only what is due is taken
        at, key = soonest
        holding = next(each for each in self._storage.held(key) if each.replicate_at == at)
        self.cancel(key, holding)
        return key, holding.public_key


class Replicator:
    """Passes on what a node holds, but never its own records: those their publisher refreshes."""

    def __init__(self, protocol: PlasmProtocol, clock: Clock, *, k: int, alpha: int) -> None:
        self._protocol = protocol
        self._storage = protocol.storage
        self._clock = clock
        self._k = k
        self._alpha = alpha
        self._due = Replications(self._storage, clock)
        self._newcomers: DueQueue[Address] = DueQueue(clock, look_again=LOOK_AGAIN)
        self._storage.on_remove = self._due.cancel

    def on_change(self, key: bytes, holding: Holding) -> None:
        """Note what is held now."""
        if not holding.own:
            every, spread = self._interval(holding)
            left = max(every - (self._clock.monotonic() - holding.received), 0.0)  # less, if from an earlier run
            self._due.schedule(key, holding, left + spread * random.random())

    def on_contact(self, contact: Contact) -> None:
        """Note a new contact, which may be closer to some of the records than others that hold them."""
        if self._storage.records and len(self._newcomers) < MAX_NEWCOMERS:
            self._newcomers.schedule(contact.address, HAND_OFF_AFTER)

    async def run(self) -> None:
        """Pass on what is due, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._due.run(self._replicate, limit=LIMIT))
            group.create_task(self._newcomers.run(self._hand_off, limit=LIMIT))

    async def repair(self, pairs: Iterable[tuple[Contact, Record]], key: bytes) -> None:
        """Send a reader's newest bytes to holders that showed older ones."""
        await asyncio.gather(*(self._store(contact, key, record.envelope) for contact, record in pairs))

    def concerns(self, contact: Contact) -> Iterator[bytes]:
        """The held keys that the contact may have to hold and that nobody else we know is closer to than this node.

        Those are the keys on our side of every bit at which no other live contact differs from us; in the order of
        distance each such bit is one range. Above its size all of its keys are alike, so that one key says of the whole
        range whether the contact is too far from it: no other key is looked at.
        """
        router = self._protocol.router
        own = self._protocol.source_node.long_id
        taken = {(own ^ each.long_id).bit_length() for each in router.live() if each.id != contact.id}
        low = min(taken, default=ids.ID_BYTES * 8 + 1) - 1  # nearer than everybody: one range
        higher = [bits - 1 for bits in range(low + 2, ids.ID_BYTES * 8 + 1) if bits not in taken]
        for size, nearest in chain([(low, 0)], ((bits, 2**bits) for bits in higher)):
            keys = iter(self._storage.keys_between(nearest, nearest + 2**size))
            for first in islice(keys, 1):
                if not self._is_too_far(contact, int.from_bytes(first), size):
                    yield first
                    yield from keys

    def _is_too_far(self, contact: Contact, target: int, size: int) -> bool:
        """Whether k others are closer than the contact to every key that differs from the target in these bits only."""
        near = self._protocol.router.closest(target, self._k)
        return len(near) == self._k and (near[-1].long_id ^ target) >> size < (contact.long_id ^ target) >> size

    def _owes(self, contact: Contact, key: bytes) -> bool:
        target = int.from_bytes(key)
        ids = [each.long_id for each in self._protocol.router.closest(target, self._k)]
        others = [each for each in ids[:2] if each != contact.long_id]
        own: int = self._protocol.source_node.long_id
        return contact.long_id in ids and (not others or own ^ target < others[0] ^ target)

    def _interval(self, holding: Holding) -> tuple[float, float]:
        contested = holding.withdrawn or self._clock.now() < holding.contested_until
        return (EVERY_CONTESTED, SPREAD_CONTESTED) if contested else (EVERY, SPREAD)

    async def _replicate(self, job: Job) -> None:
        key, public_key = job
        holding = self._storage.holding(key, public_key)
        monotonic = self._clock.monotonic()
        if holding is None or holding.own or holding.is_over(self._clock.now(), monotonic):
            return
        every, spread = self._interval(holding)
        early = every - (monotonic - holding.received)
        if early > 0:
            self._due.schedule(key, holding, early + spread * random.random())
            return
        holding.received = monotonic
        closest = await NodeLookup(self._protocol, key, k=self._k, alpha=self._alpha).run()
        await asyncio.gather(*(self._store(contact, key, holding.envelope) for contact in closest))
        if self._storage.holding(key, public_key) is not holding:
            return  # what replaced it has its own time
        own, target = self._protocol.source_node.long_id, int.from_bytes(key)
        if len(closest) < self._k or own ^ target < closest[-1].long_id ^ target:
            self._due.schedule(key, holding, every + spread * random.random())
        # else the k closest hold it now, and it is theirs to replicate

    async def _hand_off(self, address: Address) -> None:
        contact = self._protocol.router.at(address)
        if contact is None:
            return
        handed = 0
        keys = self.concerns(contact)
        while some := list(islice(keys, LOOKED_AT)):
            owed = self._owed(contact, some)
            for start in range(0, len(owed), SLICE):
                stores = [self._store(contact, key, envelope) for key, envelope in owed[start : start + SLICE]]
                if not any(await asyncio.gather(*stores)):
                    return  # it does not answer, or wants none
            handed += len(owed)
            await asyncio.sleep(0)  # the node has others to answer
        if handed:
            log.debug("handed %s to %s", counted(handed, "record"), contact)

    def _owed(self, contact: Contact, keys: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
        """(key, envelope) of what is not over, under those of the keys that the contact is owed."""
        now, monotonic = self._clock.now(), self._clock.monotonic()
        return [
            (key, holding.envelope)
            for key in keys
            if self._owes(contact, key)
            for holding in self._storage.holdings(key)
            if not holding.is_over(now, monotonic)
        ]

    async def _store(self, contact: Contact, key: bytes, envelope: bytes) -> bool:
        """Whether the contact accepted; one that holds a newer record teaches it to us."""
        stored: wire.Stored | None
        _, stored = await self._protocol.call_store(contact, key, envelope)
        if stored is not None and stored.held is not None:
            self._storage.store(key, stored.held)
        return stored is not None and stored.ok
