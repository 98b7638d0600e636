"""What a holder owes others: hand-off to closer nodes, replication, repair. Always the same bytes, never a longer life.

A holder that received a record within the last hour does not replicate it again; with a tombstone, or a record that
replaced a different one which may still be alive somewhere, the last ten minutes: so a healed partition converges.
"""

import asyncio
import logging
import random
from collections.abc import Iterable

from plasm_dht.clock import Clock
from plasm_dht.dht import ids, wire
from plasm_dht.dht.due import DueQueue
from plasm_dht.dht.lookup import NodeLookup
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.storage import Holding
from plasm_dht.record import Record

log = logging.getLogger(__name__)

# A record that was received this long ago is replicated (s; the paper, section 2.5), a tombstone or a change sooner, so
# that everybody has it within 11 minutes of a healed partition (contract, "Life of a record", 5).
EVERY, EVERY_CONTESTED = 3600.0, 600.0
# All holders got it at the same moment: the first to replicate spares the others (s).
SPREAD, SPREAD_CONTESTED = 600.0, 30.0
# A newcomer is given its records after this long (s), when both tables have settled.
HAND_OFF_AFTER = 1.0
# Replications and hand-offs under way at once, and records of one hand-off under way at once.
LIMIT = 4
SLICE = 16
# The wall clock only matters to whoever signs: replication need not look at it often (s).
LOOK_AGAIN = 600.0

Job = tuple[bytes, bytes]  # key, public key


class Replicator:
    """Passes on what a node holds, but never its own records: those their publisher refreshes."""

    def __init__(self, protocol: PlasmProtocol, clock: Clock, *, k: int, alpha: int) -> None:
        self._protocol = protocol
        self._storage = protocol.storage
        self._clock = clock
        self._k = k
        self._alpha = alpha
        self._due: DueQueue[Job] = DueQueue(clock, look_again=LOOK_AGAIN)
        self._newcomers: DueQueue[bytes] = DueQueue(clock, look_again=LOOK_AGAIN)

    def on_change(self, key: bytes, holding: Holding) -> None:
        """Note what is held now."""
        if not holding.own:
            every, spread = self._interval(holding)
            self._due.schedule((key, holding.public_key), every + spread * random.random())

    def on_contact(self, contact: Contact) -> None:
        """Note a new contact, which may be closer to some of the records than others that hold them."""
        if self._storage.records:
            self._newcomers.schedule(contact.id, HAND_OFF_AFTER)

    async def run(self) -> None:
        """Pass on what is due, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._due.run(self._replicate, limit=LIMIT))
            group.create_task(self._newcomers.run(self._hand_off, limit=LIMIT))

    async def repair(self, pairs: Iterable[tuple[Contact, Record]], key: bytes) -> None:
        """Send a reader's newest bytes to holders that showed older ones."""
        await asyncio.gather(*(self._store(contact, key, record.envelope) for contact, record in pairs))

    def concerns(self, contact: Contact) -> list[bytes]:
        """The held keys that the contact should hold and that nobody else we know is closer to than this node.

        Those are the keys on our side of every bit at which no other live contact differs from us; in the order of
        distance each such bit is one range, so that no other key is looked at.
        """
        router = self._protocol.router
        own = self._protocol.source_node.long_id
        taken = {(own ^ each.long_id).bit_length() for each in router.live() if each.id != contact.id}
        keys: list[bytes] = []
        nearest = 0
        for bits in sorted(taken):  # between two taken bits, and nearer than the first, nobody is closer than this node
            keys.extend(self._storage.keys_between(nearest, 2 ** (bits - 1)))
            nearest = 2**bits
        keys.extend(self._storage.keys_between(nearest, 2 ** (ids.ID_BYTES * 8)))
        return [key for key in keys if self._owes(contact, key)]

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
            self._due.schedule(job, early + spread * random.random())
            return
        holding.received = monotonic
        closest = await NodeLookup(self._protocol, key, k=self._k, alpha=self._alpha).run()
        await asyncio.gather(*(self._store(contact, key, holding.envelope) for contact in closest))
        own, target = self._protocol.source_node.long_id, int.from_bytes(key)
        if len(closest) < self._k or own ^ target < closest[-1].long_id ^ target:
            self._due.schedule(job, every + spread * random.random())
        # else the k closest hold it now, and it is theirs to replicate

    async def _hand_off(self, node_id: bytes) -> None:
        contact = self._protocol.router.find(node_id)
        if contact is None:
            return
        keys = self.concerns(contact)
        now, monotonic = self._clock.now(), self._clock.monotonic()
        owed = [
            (key, holding.envelope)
            for key in keys
            for holding in self._storage.holdings(key)
            if not holding.is_over(now, monotonic)
        ]
        for start in range(0, len(owed), SLICE):
            stores = [self._store(contact, key, envelope) for key, envelope in owed[start : start + SLICE]]
            if not any(await asyncio.gather(*stores)):
                return  # it does not answer, or wants none
        if owed:
            log.debug("handed %d records to %s", len(owed), contact)

    async def _store(self, contact: Contact, key: bytes, envelope: bytes) -> bool:
        """Whether the contact accepted; one that holds a newer record teaches it to us."""
        answered, result = await self._protocol.call_store(contact, key, envelope)
        stored = wire.parse_stored(result) if answered else None
        if stored is not None and stored.held is not None:
            self._storage.store(key, stored.held)
        return stored is not None and stored.ok
