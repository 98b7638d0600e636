"""Finding every publisher's newest record of a name under one of its keys: from the network, never from a cache.

Every record is verified; of each publisher the newest counts, live or not.
"""

import asyncio
import contextlib
import math
from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from plasm_dht.clock import is_in_doubt, reader_time
from plasm_dht.dht import density, wire
from plasm_dht.dht.candidate import Candidate
from plasm_dht.dht.lookup import Asker, NodeLookup
from plasm_dht.dht.routing import NETWORK_SHARE, Contact, network_of
from plasm_dht.dht.wire import Outcome
from plasm_dht.errors import RecordError
from plasm_dht.record import Record, decode, freshest_first, keys_of, verify

# Envelopes that one responder is asked for: the publishers that a holder keeps a key (storage.MAX_PUBLISHERS).
MAX_ENVELOPES = 32
# Signatures of one reply that are checked, 0.1 to 0.3 ms each: more of the smallest records do not fit a datagram of
# ours, and whoever sends 9 KiB of junk is to hold up the loop no longer.
MAX_IN_REPLY = 10


def live(records: Iterable[Record], now: int, trust: frozenset[bytes]) -> Iterator[Record]:
    """Those of publishers in `trust` (anybody's when empty) that are live at `now` (Unix ms)."""
    return (each for each in records if each.is_live(now) and (not trust or each.public_key in trust))


class RecordLookup(NodeLookup):
    """Finds every publisher's newest record of a name under one of its keys.

    With a `quorum` it ends as soon as that many holders agree on the freshest live record of a publisher in `trust`
    (anybody when empty) and no more than half of all contradict the time, or when nobody but the silent is left to
    answer and it has a live record or k answers that there is none; without one it asks all of the k closest for all
    that they hold.
    """

    def __init__(
        self,
        protocol: Asker,
        key: bytes,
        *,
        k: int,
        alpha: int,
        quorum: int | None = None,
        trust: frozenset[bytes] = frozenset(),
    ) -> None:
        super().__init__(protocol, key, k=k, alpha=alpha)
        self.quorum = quorum
        self.trust = trust
        # The newest record of each publisher that anybody showed, live or not.
        self.winners: dict[bytes, Record] = {}
        self.own = Candidate(Contact(protocol.source_node.id, "", 0), 0, stale=False)
        self._heard: list[float] = []  # by how much the responders' clocks are ahead of our monotonic one (ms)
        self.nodes: float | None = None
        self.core = math.inf  # before the nodes are counted no quorum counts
        self._verified: dict[bytes, Record | None] = {}
        held = [holding.envelope for holding in protocol.storage.holdings(key)]
        self._verified.update((envelope, decode(envelope)) for envelope in held)  # what is held was verified
        self._learn(self.own, held)

    @property
    def samples(self) -> list[int]:
        """What the responders' clocks say now (Unix ms), however long others have been waited for meanwhile."""
        monotonic = self.protocol.clock.monotonic() * 1000
        return [round(ahead + monotonic) for ahead in self._heard]

    def forget_samples(self) -> None:
        """Let nobody who has answered so far say what time it is."""
        self._heard.clear()

    def count(self, nodes: float | None) -> None:
        """Take in how many nodes the network has, `None` when those are too few to say."""
        self.nodes = nodes
        self.core = 0.0 if nodes is None else density.reach(density.CORE, nodes)

    def live(self) -> list[Record]:
        """Each trusted publisher's newest record, if it is live, freshest first."""
        now = reader_time(self.samples, self.protocol.clock.now())
        ended = self.ended()
        return freshest_first(live((each for each in self.winners.values() if each not in ended), now, self.trust))

    def ended(self) -> list[Record]:
        """Which of the winners we hold ourselves and know to be over, whatever the wall clock says now."""
        monotonic = self.protocol.clock.monotonic()
        held = {each.envelope for each in self.protocol.storage.holdings(self.target.id) if monotonic >= each.deadline}
        return [record for record in self.winners.values() if record.envelope in held]

    async def ask_also(self, contacts: Iterable[Contact], timeout: float) -> None:
        """Ask those who were not asked yet, all at once, and wait no longer than `timeout` seconds."""
        asked = {each.contact.id for each in self._candidates if each.asked} | {self.protocol.source_node.id}
        asking = (self._ask_also(contact) for contact in contacts if contact.id not in asked)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.gather(*asking)

    async def _ask_also(self, contact: Contact) -> None:
        candidate = Candidate(contact, contact.distance_to(self.target), stale=False)
        candidate.asked = again = True
        while again:
            found: wire.Found | None = (await self.query(candidate))[1]
            if found is None:
                return
            if not candidate.answered:
                candidate.answered = True
                insort(self._candidates, candidate)
            again = self.receive(candidate, found)

    def newest(self, public_key: bytes, known: Collection[int]) -> Record | None:
        """The newest record of a publisher that anybody showed whose `seq` is not among the known ones."""
        shown = (each.envelopes.get(public_key) for each in [self.own, *self._candidates])
        records = [record for record in shown if record is not None and record.seq not in known]
        return max(records, key=lambda record: record.rank, default=None)

    def outdated(self) -> list[tuple[Contact, Record]]:
        """Whom to repair with what: holders of an older record, and one without any that is nearer than a holder."""
        now = reader_time(self.samples, self.protocol.clock.now())
        pairs: list[tuple[Contact, Record]] = []
        for winner in self.winners.values():
            if now >= winner.expires_at:
                continue
            lacking: Candidate | None = None
            for candidate in self.answered()[: self.k]:
                shown = candidate.envelopes.get(winner.public_key)
                if shown is None:
                    lacking = lacking or candidate
                elif shown.rank < winner.rank:
                    pairs.append((candidate.contact, winner))
                elif lacking is not None and not winner.withdrawn:
                    pairs.append((lacking.contact, winner))
                    lacking = None
                    break
        return pairs[: self.k]

    def is_done(self) -> bool:
        """Whether a quorum agrees on the freshest live record, or all but the silent have answered and there is one."""
        if self.quorum is None:
            return False
        if (
            self.winners
            and self._has_heard_several()
            and (live := self.live())
            and self._is_agreed(live[0])
            and not is_in_doubt(self.samples, self.protocol.clock.now())
        ):
            return True
        if not all(candidate.answered or candidate.silent for candidate in self._window()):
            return False
        # That there is nothing is believed of k that answered, never of silence.
        return bool(self.live()) or sum(candidate.answered for candidate in self._window()) >= self.k

    def needs_id(self, candidate: Candidate) -> bool:
        """Whoever shows a record that was verified is a holder, whatever its id: a quorum need not wait for that."""
        return self.quorum is None or not candidate.envelopes

    def _has_heard_several(self) -> bool:
        """Whether nobody alone has led us to all who agree: a liar names liars, and together they show an older record.

        The first alpha contacts that were asked, our own, have answered or are slow.
        """
        return all(each.answered or each.slow or each.failed for each in self._first)

    def _is_agreed(self, record: Record) -> bool:
        """Whether a quorum shows this record, one of them not among the very nearest: who crowds there is no quorum."""
        holders = [each for each in self._candidates if self._shows(each, record)]
        if not holders or holders[-1].distance < self.core:
            return False
        return self._count_holders(holders) + self._shows(self.own, record) >= (self.quorum or 0)

    def _shows(self, candidate: Candidate, record: Record) -> bool:
        held = candidate.envelopes.get(record.public_key)
        return held is not None and held.rank == record.rank

    def _count_holders(self, holders: Iterable[Candidate]) -> int:
        """How many they are, of one network no more than two: several addresses there may be one machine."""
        networks = Counter(network_of(each.contact.ip) for each in holders)
        return sum(count if network is None else min(count, NETWORK_SHARE) for network, count in networks.items())

    def _next(self) -> tuple[Candidate | None, bool]:
        candidate, complete = super()._next()
        return candidate and self._apart(candidate), complete

    def _apart(self, candidate: Candidate) -> Candidate:
        """Whom to ask instead, so that those who are asked first can be a quorum: one of them is not as near."""
        if self.quorum is None or candidate.distance >= self.core:
            return candidate
        near, other = 0, None
        for each in self._candidates:
            if each.distance >= 2 * self.k / density.CORE * self.core:
                break  # nobody is a holder there
            if each.distance < self.core:
                near += each.asked and not each.failed
            elif near < self.quorum - 1 or each.envelopes or (each.asked and not (each.answered or each.slow)):
                return candidate
            elif other is None and not (each.asked or each.stale) and self._is_vouched_for(each):
                other = each
        return other or candidate

    def query(self, candidate: Candidate) -> "asyncio.Future[Outcome]":
        """Ask for what it holds beyond what it has shown."""
        return self.protocol.call_find_value(candidate.contact, self.target, candidate.shown)

    def receive(self, candidate: Candidate, found: wire.Found) -> bool:
        """Take in what it holds; ask again when there is more and all of it is wanted."""
        if found.now is not None and candidate.shown == 0:
            self._heard.append(found.now - self.protocol.clock.monotonic() * 1000)
        envelopes = found.envelopes[:MAX_IN_REPLY]
        self._learn(candidate, envelopes)
        candidate.shown += len(envelopes)
        return self.quorum is None and found.more and bool(found.envelopes) and candidate.shown < MAX_ENVELOPES

    def _learn(self, candidate: Candidate, envelopes: Iterable[bytes]) -> None:
        for envelope in envelopes:
            record = self._verify(envelope)
            if record is None:
                continue
            candidate.envelopes[record.public_key] = record
            winner = self.winners.get(record.public_key)
            if winner is None or record.rank > winner.rank:
                self.winners[record.public_key] = record

    def _verify(self, envelope: bytes) -> Record | None:
        """The record in the envelope, if its publisher signed it for this key. Distinct envelopes are verified once."""
        if envelope not in self._verified:
            try:
                record = decode(envelope)
            except RecordError:
                self._verified[envelope] = None
            else:
                valid = self.target.id in keys_of(record) and verify(record)
                self._verified[envelope] = record if valid else None
        return self._verified[envelope]
