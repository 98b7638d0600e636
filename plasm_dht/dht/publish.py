"""What a publisher owes its records: sign them, store them at the k closest of both keys, and see that nobody keeps an
older one.

The intent of each name (its value, its life, whether it is withdrawn) is in one place and every signature is made from
it, so that whatever overlaps (a refresh, a change, a withdrawal) the highest `seq` says what is meant.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable

from plasm_dht.clock import Clock, is_right_again, network_time, reader_time, that_count
from plasm_dht.dht import wire
from plasm_dht.dht.due import DueQueue
from plasm_dht.dht.find import RecordLookup
from plasm_dht.dht.ids import Address
from plasm_dht.dht.intent import SIGNED_REMEMBERED, Holder, Intent, Publication, Round, advertised
from plasm_dht.dht.lookup import LOOKUP_TIMEOUT, NodeLookup
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.wire import Outcome
from plasm_dht.errors import RecordError
from plasm_dht.identity import Identity
from plasm_dht.record import Record, Value, bound_key, decode, shared_key, verify

log = logging.getLogger(__name__)

# Rounds of signing anew when holders know a newer record, or that our clock is wrong.
ROUNDS = 3
# First and longest wait before a holder that is owed a change is asked again (s).
OWED_FIRST, OWED_LONGEST = 5.0, 60.0
# A record that nobody else holds is pushed this long after a neighbour appeared (s), when there are more of them.
PUSH_AFTER = 0.3
# A host that lets another's record stand looks again this long before that one ends, and no sooner than after (s).
LOOK_BEFORE, LOOK_LEAST = LOOKUP_TIMEOUT, 0.2
# Records that are being published at once: thousands of them at one moment would run into the holders' rate limits.
ROUNDS_AT_ONCE = 64
# Pushes and owed stores under way at once.
LIMIT = 16


Owed = tuple[str, bytes, Address]  # name, key, holder
Stores = dict[tuple[bytes, Address], tuple[Contact, "asyncio.Future[Outcome]"]]  # under way, by key and holder


class Publisher:
    """Publishes records of one identity and keeps its promises about them.

    `on_round(intent, enough, took)` is told after each publish or refresh of what is kept alive whether enough holders
    acknowledged it, and how many seconds ago it was signed.
    """

    def __init__(
        self,
        identity: Identity,
        protocol: PlasmProtocol,
        clock: Clock,
        *,
        k: int,
        alpha: int,
        on_round: Callable[[Intent, bool, float], None],
    ) -> None:
        self.intents: dict[str, Intent] = {}
        self._identity = identity
        self._protocol = protocol
        self._clock = clock
        self._k = k
        self._alpha = alpha
        self._on_round = on_round
        self._owed: DueQueue[Owed] = DueQueue(clock)
        self._debts: dict[Owed, tuple[Holder, int]] = {}  # with the number of attempts
        self._pushes: DueQueue[str] = DueQueue(clock)
        self._slots = asyncio.Semaphore(ROUNDS_AT_ONCE)
        self._lonely: dict[str, None] = {}  # in a fixed order, so that a simulated run can be repeated
        protocol.stats.advertised = lambda: advertised(self.intents.values(), len(self._debts))

    async def publish(self, name: str, value: Value, *, ttl: float, keep_alive: bool) -> Publication:
        """Say from now on `value` about the name, for `ttl` seconds at a time."""
        intent = self._intent(name)
        intent.value, intent.ttl, intent.withdrawn, intent.kept_alive = value, ttl, False, keep_alive
        intent.told = None  # just said: it beats whatever is found, until enough holders have it
        try:
            return await self._settle(intent, owed=True)
        except asyncio.CancelledError:  # whoever waited gave up, but what was said is still to be kept alive
            if keep_alive:
                intent.said = "whoever published it did not wait for holders to answer"
                self._on_round(intent, False, 0.0)
            raise

    async def refresh(self, name: str, *, owed: bool = False) -> None:
        """Sign and publish anew what is said about the name; `owed`: to whoever has an older record alive, too."""
        intent = self.intents.get(name)
        if intent is not None and intent.kept_alive:
            await self._settle(intent, owed=owed)

    def set_ttl(self, before: float, ttl: float) -> list[Intent]:
        """Sign what is kept alive for `before` seconds at a time for `ttl` seconds from now on. What that is."""
        changed = [intent for intent in self.intents.values() if intent.kept_alive and intent.ttl == before]
        for intent in changed:
            intent.ttl = ttl
        return changed

    async def withdraw(self, name: str) -> Publication | None:
        """Take back what this identity says about the name; `None` when nothing of it is alive."""
        intent = self._intent(name)
        # Before anything is awaited: a publish that has not signed yet then signs what is meant now.
        intent.value, intent.withdrawn, intent.kept_alive = b"", True, False
        if intent.stands_by:
            log.info("%r is not withdrawn: what is out there is of another node with this identity", name)
            self._forget(intent)
            return None
        intent.told = None
        if not intent.continued:
            await self._look_up(intent)
        if not intent.withdrawn:
            return None  # published again meanwhile
        if intent.latest_end <= self._clock.now():
            self._forget(intent)
            return None
        return await self._settle(intent, owed=True)

    def has_told(self, name: str) -> bool:
        """Whether another node acknowledged what is said about the name now, or there is nobody to tell."""
        intent = self.intents.get(name)
        if intent is None or intent.record is None or len(self._protocol.router) == 0:
            return True
        return any(intent.acknowledged(key, intent.record) for key in intent.holders)

    def on_contact(self) -> None:
        """A neighbour appeared: push what nobody else holds."""
        for name in self._lonely:
            if name not in self._pushes:
                self._pushes.schedule(name, PUSH_AFTER)

    def expire(self) -> None:
        """Forget what has ended and is not kept alive."""
        now = self._clock.now()
        for intent in list(self.intents.values()):
            if not intent.kept_alive and intent.record is not None and intent.latest_end < now:
                self._forget(intent)

    async def run(self) -> None:
        """Pay what is owed, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._owed.run(self._pay, limit=LIMIT))
            group.create_task(self._pushes.run(self._push, limit=LIMIT))

    # -- one round ---------------------------------------------------------------------------------------------------

    async def _settle(self, intent: Intent, *, owed: bool, again: bool = False) -> Publication:
        """Store the intent, signed anew (`again`: the same bytes), and anew if holders teach us a `seq` or the time."""
        async with self._slots:
            return await self._settle_now(intent, owed=owed, again=again)

    async def _settle_now(self, intent: Intent, *, owed: bool, again: bool) -> Publication:
        record = intent.record if again else None
        if record is None and intent.continued and (intent.told is None or self._is_ending(intent)):
            record = self._sign(intent)
        closest: dict[bytes, list[Contact]] | None = None
        for attempt in range(1, ROUNDS + 1):
            outcome, closest = await self._round(intent, record, closest, owed=owed)
            if intent.record is not outcome.record or intent.stands_by:
                break  # superseded: whoever signed the later one sees to it
            learnt = self._learn_newer(intent, outcome) | self._learn_time(outcome)
            if not learnt or attempt == ROUNDS:
                self._conclude(intent, outcome, closest, owed=owed, took=self._clock.elapsed() - intent.signed_at)
                break
            record = None
        signed = outcome.record
        return Publication(intent.name, signed.seq, signed.expires_at, len(outcome.told), dict(outcome.refused))

    async def _round(
        self, intent: Intent, record: Record | None, closest: dict[bytes, list[Contact]] | None, *, owed: bool
    ) -> tuple[Round, dict[bytes, list[Contact]]]:
        stores: Stores = {}
        if record is not None and owed:
            self._store_behind(stores, intent, record)
        closest = closest or await self._look_up(intent)
        if intent.superseding is not None:
            self._stand_by(intent, intent.superseding)
            return Round(intent.superseding), closest
        if record is None or record.seq < intent.last_seq:
            record, stores = self._sign(intent), {}
            if owed:
                self._store_behind(stores, intent, record)
        for key, contacts in closest.items():
            self._store(stores, intent, record, key, contacts)
        outcome = Round(record, asked=len(stores))
        for (key, _), (contact, future) in stores.items():
            self._tally(intent, outcome, key, contact, await future)
        for key, contacts in closest.items():
            near = {contact.address for contact in contacts}
            alone = not near and len(self._protocol.router) == 0
            if not alone and not outcome.is_enough(key, near, intent.acknowledged(key, record)):
                outcome.enough = False
        return outcome, closest

    async def _look_up(self, intent: Intent) -> dict[bytes, list[Contact]]:
        """The k closest to both keys, and what this identity has said under the bound one before or elsewhere."""
        shared, bound = shared_key(intent.name), bound_key(self._identity.public_key, intent.name)
        nodes = NodeLookup(self._protocol, shared, k=self._k, alpha=self._alpha)
        own = RecordLookup(self._protocol, bound, k=self._k, alpha=self._alpha)
        count = functools.partial(self._protocol.node_count, shared, bound)
        near_shared, near_bound = await asyncio.gather(nodes.run_beyond(count), own.run_beyond(count))
        record = own.newest(self._identity.public_key, intent.signed)
        if record is not None:
            if intent.continued and record.seq > min(intent.signed, default=0):
                self._warn_of_another(intent, record)
            elif not intent.continued:
                log.info("going on from seq %d of %r, found in the network", record.seq, intent.name)
            self._go_on_from(intent, record)
        if intent.rival is not None and not intent.rival.is_live(reader_time(own.samples, self._clock.now())):
            intent.rival = None
        intent.continued = intent.continued or bool(near_bound)  # nobody answered is not the same as not found
        return {shared: near_shared, bound: near_bound}

    def _sign(self, intent: Intent) -> Record:
        record = intent.sign(self._identity, self._clock.now(), self._clock.elapsed())
        for key in (shared_key(intent.name), bound_key(self._identity.public_key, intent.name)):
            intent.holders.setdefault(key, {})
            self._protocol.storage.keep_own(key, record)
        return record

    def _is_ending(self, intent: Intent) -> bool:
        """Whether what this node has said could end during a look-up: then it is signed anew before."""
        if intent.record is None or intent.stands_by:
            return False
        return intent.record.expires_at - self._clock.now() < LOOKUP_TIMEOUT * 1000

    def _store_behind(self, stores: Stores, intent: Intent, record: Record) -> None:
        """Who has an older one need not wait for the lookups."""
        for key, holders in intent.holders.items():
            behind = [each.contact for each in holders.values() if each.seq < record.seq]
            self._store(stores, intent, record, key, behind)

    def _store(self, stores: Stores, intent: Intent, record: Record, key: bytes, contacts: Iterable[Contact]) -> None:
        for contact in contacts:
            if (key, contact.address) not in stores:
                future = self._protocol.call_store(contact, key, record.envelope)
                # at once: a stop that waits for a dead holder no longer knows who else has acknowledged
                future.add_done_callback(functools.partial(_hear, intent, record, key, contact))
                stores[key, contact.address] = (contact, future)

    def _tally(self, intent: Intent, outcome: Round, key: bytes, contact: Contact, result: Outcome) -> None:
        stored: wire.Stored | None = result[1]
        if stored is None:
            return
        outcome.answered += 1
        if stored.now is not None:
            outcome.samples.append(stored.now)
        if stored.ok:
            outcome.told.add(contact.address)
            intent.note_holder(key, contact, outcome.record)
            return
        outcome.refused[stored.reason or "unspecified"] += 1
        if stored.reason in outcome.mistimed and stored.now is not None:
            outcome.mistimed[stored.reason].append(stored.now)
            if not self._clock.correction:  # else those who had us correct it may be the ones who are wrong
                outcome.contradicting.add((key, contact.address))
        if stored.held is not None:
            outcome.newer.append(stored.held)

    # -- what a round teaches ----------------------------------------------------------------------------------------

    def _go_on_from(self, intent: Intent, record: Record) -> None:
        """Take over what this identity has published elsewhere or before."""
        intent.last_seq = max(intent.last_seq, record.seq)
        intent.latest_end = max(intent.latest_end, record.expires_at)
        if intent.rival is None or record.rank > intent.rival.rank:
            intent.rival = record

    def _stand_by(self, intent: Intent, rival: Record) -> None:
        """Let stand what another host has said later with this key; say the own again when that has ended."""
        if not intent.kept_alive:
            self._forget(intent)
            return
        if intent.record is not rival:
            intent.record = rival
            for key in (shared_key(intent.name), bound_key(self._identity.public_key, intent.name)):
                self._protocol.storage.keep_own(key, rival)
        intent.failing, intent.said = False, "another node with this identity has said something later"
        left = (rival.expires_at - self._clock.now()) / 1000
        self._pushes.schedule(intent.name, max(left - LOOK_BEFORE, left / 2, LOOK_LEAST))
        self._on_round(intent, True, 0.0)

    def _learn_newer(self, intent: Intent, outcome: Round) -> bool:
        """Whether a holder showed a record of ours that beats this one, which makes it necessary to sign again."""
        again = False
        for envelope in outcome.newer:
            try:
                record = decode(envelope)
            except RecordError:
                continue
            ours = record.public_key == self._identity.public_key and record.name == intent.name
            if ours and record.rank > outcome.record.rank and record.seq not in intent.signed and verify(record):
                self._warn_of_another(intent, record)
                self._go_on_from(intent, record)
                again = True
        return again

    def _warn_of_another(self, intent: Intent, record: Record) -> None:
        if intent.rival is not None and intent.rival.seq >= record.seq:
            return  # said already
        log.warning(
            "another node publishes %r with this identity (seq %d): the later one wins; give each provider its own key",
            record.name,
            record.seq,
        )

    def _learn_time(self, outcome: Round) -> bool:
        """Whether the holders' clocks show that ours is wrong, which makes it necessary to sign again."""
        own = self._clock.now()
        found = network_time(outcome.samples, own)
        if self._clock.correction and is_right_again(outcome.samples, self._clock.wall()):
            self._clock.correction = 0
            log.info("the clock of this machine agrees again with those of the holders: records are signed with it")
            return True
        # Who refuses what is too early for it and who what is too late for it do not contradict us together.
        for refused in (that_count(each, own) for each in outcome.mistimed.values()):
            if found is None and 2 * len(refused) > outcome.answered:
                found = refused[len(refused) // 2]
        if found is None:
            return False
        self._clock.correction += found - own
        log.warning(
            "the clock of this machine is %.0f s off by the clocks of the holders that answered: "
            "records are signed with theirs; set the clock",
            -self._clock.correction / 1000,
        )
        return True

    def _conclude(
        self, intent: Intent, outcome: Round, closest: dict[bytes, list[Contact]] | None, *, owed: bool, took: float
    ) -> None:
        intent.stored, intent.failing, intent.said = len(outcome.told), not outcome.enough, str(outcome)
        if outcome.told:
            self._lonely.pop(intent.name, None)
        elif intent.name not in self._lonely:
            self._lonely[intent.name] = None
            log.info("%r is only kept here: no other node acknowledged it so far", intent.name)
        if outcome.enough and outcome.is_contradicted:
            log.warning("%r is held by few (%s): set the clocks of those who refuse it, or ours", intent.name, outcome)
        if outcome.enough:
            intent.acknowledged_end = outcome.record.expires_at
            if outcome.told and (outcome.record.value, outcome.record.withdrawn) == (intent.value, intent.withdrawn):
                intent.told = outcome.record
                while len(intent.signed) > SIGNED_REMEMBERED:
                    intent.signed.popleft()
        intent.forget_holders(self._clock.now())  # after a refresh, too: over weeks the holders of a key change
        if owed:
            self._owe(intent, outcome.record, closest or {})
        if intent.kept_alive:
            self._protocol.stats.note_round(outcome.enough)
            self._on_round(intent, outcome.enough, took)

    # -- what is owed ------------------------------------------------------------------------------------------------

    def _owe(self, intent: Intent, record: Record, closest: dict[bytes, list[Contact]]) -> None:
        """Whoever may have an older record alive, and the k closest, are asked again until they acknowledge it."""
        for key, holders in intent.holders.items():
            done = intent.acknowledged(key, record)
            owed = {
                contact.address: Holder(contact, 0, record.expires_at) for contact in closest.get(key, [])
            } | holders
            for address, holder in owed.items():
                if address not in done:
                    self._debts[intent.name, key, address] = (holder, 1)
                    self._owed.schedule((intent.name, key, address), OWED_FIRST)

    async def _pay(self, owed: Owed) -> None:
        name, key, address = owed
        holder, attempts = self._debts.pop(owed, (None, 0))
        intent = self.intents.get(name)
        record = intent.record if intent is not None else None
        if holder is None or intent is None or record is None or holder.until <= self._clock.now():
            return
        if address in intent.acknowledged(key, record):
            return
        outcome = Round(record)
        self._tally(
            intent, outcome, key, holder.contact, await self._protocol.call_store(holder.contact, key, record.envelope)
        )
        if intent.record is record and self._learn_newer(intent, outcome):
            self._pushes.schedule(name, 0)
        elif address in outcome.told:
            self._pushes.schedule(name, PUSH_AFTER)  # a link has healed: others may be reachable now, too
        elif owed not in self._debts:
            self._debts[owed] = (holder, attempts + 1)
            self._owed.schedule(owed, min(OWED_FIRST * 2 ** min(attempts, 8), OWED_LONGEST))

    async def _push(self, name: str) -> None:
        """Store the same record again at whoever is closest now."""
        intent = self.intents.get(name)
        if intent is not None and intent.stands_by:
            await self.refresh(name)
        elif intent is not None and intent.record is not None and intent.latest_end > self._clock.now():
            await self._settle(intent, owed=True, again=True)

    def _intent(self, name: str) -> Intent:
        """What is meant of the name; a new one goes on from what this node has signed before, if that is kept."""
        if name not in self.intents:
            seq, end = self._protocol.storage.last_said(self._identity.public_key, name)
            self.intents[name] = Intent(name, last_seq=seq, latest_end=end)
        return self.intents[name]

    def _forget(self, intent: Intent) -> None:
        self.intents.pop(intent.name, None)
        self._lonely.pop(intent.name, None)
        self._pushes.cancel(intent.name)
        for owed in [owed for owed in self._debts if owed[0] == intent.name]:
            del self._debts[owed]
            self._owed.cancel(owed)


def _hear(intent: Intent, record: Record, key: bytes, contact: Contact, stored: "asyncio.Future[Outcome]") -> None:
    if not stored.cancelled() and (answer := stored.result()[1]) is not None and answer.ok:
        intent.note_holder(key, contact, record)
