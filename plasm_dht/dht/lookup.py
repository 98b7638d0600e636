"""Iterative lookups: the k closest nodes, or every publisher's newest record, from the network, never from a cache.

A lookup keeps alpha requests in flight, starts the next candidate when one is slower than expected, and ends when the k
closest that are alive have answered. Every record is verified; of each publisher the newest counts, live or not.
"""

import asyncio
from bisect import insort
from collections.abc import Collection, Iterable
from typing import Protocol

from kademlia.node import Node

from plasm_dht.clock import Clock, reader_time
from plasm_dht.dht import ids, wire
from plasm_dht.dht.roundtrip import RoundTrips
from plasm_dht.dht.routing import Contact, PlasmRoutingTable
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.dht.wire import Outcome
from plasm_dht.errors import RecordError
from plasm_dht.record import Record, decode, keys_of, verify

# A whole lookup returns the best it has after this long (s).
LOOKUP_TIMEOUT = 10.0
# Candidates that one lookup remembers, and those that it asks, in multiples of k: a responder with endless new nodes,
# each nearer than the last, stops here.
MAX_CANDIDATES = 20
MAX_ASKED = 10
# Of our own contacts the candidates once somebody is slow, in multiples of k: with half of all nodes dead the k closest
# living are among the 2k closest, give or take a few.
WIDER = 4
# A responder that has been slow for this long (s) holds up no reader that has a live record from all the others: in a
# network of two or three nodes, where no quorum can be reached, one that has just died would cost two seconds.
SILENCE = 0.25
# Envelopes that one responder is asked for: the publishers that a holder keeps a key (storage.MAX_PUBLISHERS).
MAX_ENVELOPES = 32


class Asker(Protocol):
    """What a lookup needs of the datagram path."""

    router: PlasmRoutingTable
    storage: RecordStorage
    source_node: Node
    clock: Clock
    round_trips: RoundTrips

    def call_find_node(self, node_to_ask: Contact, node_to_find: Node) -> "asyncio.Future[Outcome]":
        """Ask a contact for the nodes that it knows closest to an id."""

    def call_find_value(self, node_to_ask: Contact, node_to_find: Node, skip: int = 0) -> "asyncio.Future[Outcome]":
        """Ask a contact for what it holds under an id, without the first `skip` envelopes."""


class Candidate:
    """A node that a lookup may ask, ordered by its distance to the target."""

    __slots__ = (
        "answered",
        "asked",
        "contact",
        "distance",
        "envelopes",
        "failed",
        "shown",
        "silent",
        "slow",
        "stale",
        "timer",
    )

    def __init__(self, contact: Contact, distance: int, *, stale: bool) -> None:
        self.contact = contact
        self.distance = distance
        self.stale = stale
        self.asked = self.answered = self.failed = self.slow = self.silent = False
        # By publisher what it holds, of what we could verify.
        self.envelopes: dict[bytes, Record] = {}
        self.shown = 0  # envelopes, those that we could not verify too
        self.timer: asyncio.TimerHandle | None = None

    def __lt__(self, other: "Candidate") -> bool:
        return self.distance < other.distance


class NodeLookup:
    """Finds the k closest nodes that answer."""

    def __init__(self, protocol: Asker, key: bytes, *, k: int, alpha: int) -> None:
        self.protocol = protocol
        self.target = Node(key)
        self.k = k
        self.alpha = alpha
        self._candidates: list[Candidate] = []
        self._known: set[bytes] = {protocol.source_node.id}
        self._in_flight = 0  # of those whose answer is awaited the ones that are not slow
        self._awaited = 0
        self._asked = 0
        self._tried_again = self._widened = False
        # Most of the stale are dead: a few are asked, and more for each that answers, as after a partition.
        self._stale_asked = 0
        self._stale_limit = alpha
        self._finished: asyncio.Future[None] | None = None

    async def run(self, timeout: float = LOOKUP_TIMEOUT) -> "list[Contact]":
        """Ask until it is done or `timeout` seconds are over; the k closest that answered, nearest first."""
        router = self.protocol.router
        router.touch(self.target)
        self._finished = asyncio.get_running_loop().create_future()
        key = self.target.long_id
        self._add(router.closest(key, self.k))
        self._add(router.closest(key, self.k, stale=True))
        self._advance()
        try:
            async with asyncio.timeout(timeout):
                await self._finished
        except TimeoutError:
            pass
        finally:
            self._finished.cancel()
            for candidate in self._candidates:
                if candidate.timer is not None:
                    candidate.timer.cancel()
        return [candidate.contact for candidate in self.answered()][: self.k]

    def answered(self) -> list[Candidate]:
        """Who answered, nearest first."""
        return [candidate for candidate in self._candidates if candidate.answered]

    def is_done(self) -> bool:
        """Whether what has been learnt is enough, before all of the closest have answered."""
        return False

    def query(self, candidate: Candidate) -> "asyncio.Future[Outcome]":
        """Send the request to a candidate."""
        return self.protocol.call_find_node(candidate.contact, self.target)

    def receive(self, candidate: Candidate, found: wire.Found) -> bool:
        """Take in a reply. Returns whether the candidate has to be asked again."""
        return False

    def _add(self, contacts: Iterable[Contact]) -> None:
        for contact in contacts:
            if contact.id not in self._known:
                self._known.add(contact.id)
                insort(self._candidates, Candidate(contact, contact.distance_to(self.target), stale=contact.is_stale))
        while len(self._candidates) > MAX_CANDIDATES * self.k and not self._candidates[-1].asked:
            self._candidates.pop()

    def _widen(self) -> None:
        """Have more of our own contacts as candidates, once somebody is slow.

        When many have just died, each responder names the same k closest, most of them dead, and not the living behind.
        """
        if not self._widened:
            self._widened = True
            self._add(self.protocol.router.closest(self.target.long_id, WIDER * self.k))

    def _add_named(self, nodes: Iterable[ids.NodeTuple]) -> None:
        """Candidates that a responder named; of those in our own table we know better whether they answer."""
        find = self.protocol.router.find
        self._add(
            find(node.id) or Contact(*node) for node in nodes if node.id not in self._known and ids.is_askable(node)
        )

    def _window(self) -> list[Candidate]:
        """The k closest that count, and whoever is slow among them.

        Those that failed do not count, nor those known to be stale before they are asked. A slow one that does not
        answer is probably dead: the next is asked meanwhile, not two seconds later when it has failed.
        """
        window: list[Candidate] = []
        counted = 0
        for candidate in self._candidates:
            if counted == self.k:
                break
            if not candidate.failed and (candidate.asked or not candidate.stale):
                window.append(candidate)
                counted += candidate.answered or not candidate.slow
        return window

    def _next(self) -> tuple[Candidate | None, bool]:
        """Whom to ask now, the nearest of the window or at last a stale one; and whether all of it have answered."""
        stale: Candidate | None = None
        answered = only_stale_waited_for = True
        counted = 0
        for candidate in self._candidates:
            if candidate.failed:
                continue
            if not candidate.asked:
                if not candidate.stale:
                    return candidate, False
                stale = stale or candidate
                continue
            if not candidate.answered:
                answered = False
                only_stale_waited_for = only_stale_waited_for and candidate.stale
                if candidate.slow:
                    continue
            counted += 1
            if counted == self.k:
                break
        if only_stale_waited_for and self._stale_asked < self._stale_limit:
            return stale, answered
        return None, answered

    def _advance(self) -> None:
        if self._finished is None or self._finished.done():
            return
        complete = False
        while not (done := self.is_done()):
            candidate, complete = self._next()
            if candidate is None or self._in_flight >= self.alpha or self._asked >= MAX_ASKED * self.k:
                break
            candidate.asked = True
            self._asked += 1
            self._stale_asked += candidate.stale
            self._ask(candidate)
        if done or self._awaited == 0 or (complete and candidate is None):
            if self._awaited == 0 and self._try_again():
                self._advance()
            else:
                self._finished.set_result(None)

    def _try_again(self) -> bool:
        """Ask everybody once more when nobody answered: with few contacts that may just have been lost datagrams."""
        if self._tried_again or not self._candidates or any(candidate.answered for candidate in self._candidates):
            return False
        self._tried_again = True
        for candidate in self._candidates:
            candidate.asked = candidate.failed = False
        return True

    def _ask(self, candidate: Candidate) -> None:
        self._in_flight += 1
        self._awaited += 1
        candidate.slow = False
        patience = self.protocol.round_trips.slow_after(candidate.contact.address)
        candidate.timer = asyncio.get_running_loop().call_later(patience, self._be_slow, candidate)
        self.query(candidate).add_done_callback(lambda future: self._receive(candidate, future.result()))

    def _be_slow(self, candidate: Candidate) -> None:
        """Do not wait for this one only: its place in flight is free for the next."""
        candidate.slow = True
        self._widen()
        candidate.timer = asyncio.get_running_loop().call_later(SILENCE, self._be_silent, candidate)
        self._in_flight -= 1
        self._advance()

    def _be_silent(self, candidate: Candidate) -> None:
        """Whoever has enough without this one need not wait for it."""
        candidate.silent = True
        self._advance()

    def _receive(self, candidate: Candidate, outcome: Outcome) -> None:
        if self._finished is None or self._finished.done():
            return
        if candidate.timer is not None:
            candidate.timer.cancel()
        self._awaited -= 1
        if not candidate.slow:
            self._in_flight -= 1
        found: wire.Found | None = outcome[1]
        if found is None:
            candidate.failed = not candidate.answered
        else:
            self._stale_limit += 2 * candidate.stale
            again = self.receive(candidate, found)
            candidate.answered = not again
            self._add_named(found.nodes)
            if again:
                self._ask(candidate)
        self._advance()


class RecordLookup(NodeLookup):
    """Finds every publisher's newest record of a name under one of its keys.

    With a `quorum` it ends as soon as that many holders agree on the freshest live record of a publisher in `trust`
    (anybody when empty), or when nobody but the silent is left to answer and it has a live record or k answers that
    there is none; without one it asks all of the k closest for all that they hold.
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
        self._verified: dict[bytes, Record | None] = {}
        self._samples: list[int] = []
        held = [holding.envelope for holding in protocol.storage.holdings(key)]
        self._verified.update((envelope, decode(envelope)) for envelope in held)  # what is held was verified
        self._learn(self.own, held)

    def now(self) -> int:
        """The time (Unix ms) that decides what is live: our own clock's, or the responders' when that is wrong."""
        return reader_time(self._samples, self.protocol.clock.now())

    def live(self) -> list[Record]:
        """Each trusted publisher's newest record, if it is live, freshest first."""
        now = self.now()
        own = self.protocol.storage
        monotonic = self.protocol.clock.monotonic()
        records = []
        for record in self.winners.values():
            held = own.holding(self.target.id, record.public_key)
            ended = held is not None and held.envelope == record.envelope and monotonic >= held.deadline
            if record.is_live(now) and not ended and (not self.trust or record.public_key in self.trust):
                records.append(record)
        return sorted(records, key=lambda record: record.freshness, reverse=True)

    def newest(self, public_key: bytes, known: Collection[int]) -> Record | None:
        """The newest record of a publisher that anybody showed whose `seq` is not among the known ones."""
        shown = (each.envelopes.get(public_key) for each in [self.own, *self._candidates])
        records = [record for record in shown if record is not None and record.seq not in known]
        return max(records, key=lambda record: record.rank, default=None)

    def outdated(self) -> list[tuple[Contact, Record]]:
        """Whom to repair with what: holders of an older record, and one without any that is nearer than a holder."""
        now = self.now()
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
        live = self.live()
        if live:
            newest = live[0]
            shown = (each.envelopes.get(newest.public_key) for each in [self.own, *self._candidates])
            if sum(record is not None and record.rank == newest.rank for record in shown) >= self.quorum:
                return True
        window = self._window()
        if not all(candidate.answered or candidate.silent for candidate in window):
            return False
        # That there is nothing is believed of k that answered, never of silence.
        return bool(live) or sum(candidate.answered for candidate in window) >= self.k

    def query(self, candidate: Candidate) -> "asyncio.Future[Outcome]":
        """Ask for what it holds beyond what it has shown."""
        return self.protocol.call_find_value(candidate.contact, self.target, candidate.shown)

    def receive(self, candidate: Candidate, found: wire.Found) -> bool:
        """Take in what it holds; ask again when there is more and all of it is wanted."""
        if found.now is not None and candidate.shown == 0:
            self._samples.append(found.now)
        self._learn(candidate, found.envelopes)
        candidate.shown += len(found.envelopes)
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
