"""Iterative lookups: the k closest nodes, from the network, never from a cache.

A lookup keeps alpha requests in flight, starts the next candidate when one is slower than expected, and ends when the k
closest that are alive have answered. Nobody is one of them before it has said its id itself, and whoever names nodes
that are not there, or are somebody else, is believed no further.
"""

import asyncio
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from kademlia.node import Node

from plasm_dht.clock import Clock
from plasm_dht.dht import density, ids, wire
from plasm_dht.dht.candidate import Candidate, Namer
from plasm_dht.dht.roundtrip import RoundTrips
from plasm_dht.dht.routing import Contact, PlasmRoutingTable
from plasm_dht.dht.stats import FOUND, NO_ANSWER, Stats
from plasm_dht.dht.storage import RecordStorage
from plasm_dht.dht.wire import Outcome

# A whole lookup returns the best it has after this long (s).
LOOKUP_TIMEOUT = 10.0
# Candidates that one lookup remembers, and those that it asks, in multiples of k: a responder with endless new nodes,
# each nearer than the last, stops here.
MAX_CANDIDATES = 20
MAX_ASKED = 10
# Of our own contacts so many have answered before a lookup ends: one liar names liars only, nearer than the honest that
# we know, and they name each other. Where a fifth of all nodes lie, that all of five do is one case in 3,000.
ROOTS = 5
# Of our own contacts the candidates once somebody is slow, in multiples of k: with half of all nodes dead the k closest
# living are among the 2k closest, give or take a few.
WIDER = 4
# A responder that has been slow for this long (s) holds up no reader that has a live record from all the others: in a
# network of two or three nodes, where no quorum can be reached, one that has just died would cost two seconds.
SILENCE = 0.25


class Asker(Protocol):
    """What a lookup needs of the datagram path."""

    router: PlasmRoutingTable
    storage: RecordStorage
    source_node: Node
    clock: Clock
    round_trips: RoundTrips
    stats: Stats

    def call_find_node(self, node_to_ask: Contact, node_to_find: Node) -> "asyncio.Future[Outcome]":
        """Ask a contact for the nodes that it knows closest to an id."""

    def call_find_value(self, node_to_ask: Contact, node_to_find: Node, skip: int = 0) -> "asyncio.Future[Outcome]":
        """Ask a contact for what it holds under an id, without the first `skip` envelopes."""

    def call_ping(self, node_to_ask: Contact) -> "asyncio.Future[Outcome]":
        """Ask whoever is at a contact's address for its id."""

    def is_known(self, contact: Contact) -> bool:
        """Whether the node at this address has said this id lately."""


class Hole(NamedTuple):
    """Where a lookup asks nobody: whoever is nearer to a key than `radius`, since there is a crowd."""

    key: int
    radius: float


class NodeLookup:
    """Finds the k closest nodes that answer."""

    def __init__(self, protocol: Asker, key: bytes, *, k: int, alpha: int, hole: Hole | None = None) -> None:
        self.protocol = protocol
        self._hole = hole
        self.target = Node(key)
        self.k = k
        self.alpha = alpha
        self._candidates: list[Candidate] = []
        self._by_id: dict[bytes, Candidate | None] = {protocol.source_node.id: None}
        self._addresses: set[ids.Address] = set()  # of those that answered: one address is one node
        self._own: list[Candidate] = []  # our closest contacts, which nobody had to name
        self.silent: set[ids.Address] = set()  # who did not answer: not asked again on the word of others
        self._first: list[Candidate] = []  # who was asked before anybody had named anybody
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
        loop = asyncio.get_running_loop()
        started, self._finished = loop.time(), loop.create_future()
        key = self.target.long_id
        self._add(self._outside(router.closest(key, self.k if self._hole is None else WIDER * self.k)))
        self._own = self._candidates[: self.k]
        self._add(self._outside(router.closest(key, self.k, stale=True)))
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
        closest = [candidate.contact for candidate in self.answered()][: self.k]
        self.protocol.stats.lookups[FOUND if closest else NO_ANSWER].add(loop.time() - started)
        return closest

    async def run_beyond(self, count: Callable[[], float | None]) -> "list[Contact]":
        """As `run`, and where attackers crowd around the id, besides those who would be the closest if they did not.

        `count` says how many nodes there are, if that is known: afterwards, since who has just joined meets them here.
        """
        found, nodes = await self.run(), count()
        crowd = None if nodes is None else self.crowd(nodes)
        if nodes is None or crowd is None:
            return found
        others = await beyond(self.protocol, crowd, nodes, k=self.k, alpha=self.alpha, timeout=LOOKUP_TIMEOUT)
        there = {contact.address for contact in found}
        return found + [contact for contact in others if contact.address not in there]

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

    def needs_id(self, candidate: Candidate) -> bool:
        """Whether one that has replied counts only once it has said its id."""
        return True

    def crowd(self, nodes: float) -> Hole | None:
        """Around whom in a network of so many nodes too many are to be there by chance, those that are alive."""
        near = (each for each in self._candidates if each.answered or (each.namers is None and not each.failed))
        distances = [each.distance for each in near if not each.stale or each.answered]
        radius = density.crowd_radius(distances[: self.k], nodes)
        return None if radius is None else Hole(self.target.long_id, radius)

    def _add(self, contacts: Iterable[Contact], namer: Namer | None = None) -> None:
        for contact in contacts:
            candidate = self._by_id.get(contact.id)
            if candidate is None and contact.id not in self._by_id:
                candidate = Candidate(contact, contact.distance_to(self.target), stale=contact.is_stale)
                candidate.namers = None if namer is None or self.protocol.is_known(contact) else []
                self._by_id[contact.id] = candidate
                insort(self._candidates, candidate)
            if candidate is not None and candidate.namers is not None and namer is not None:
                candidate.namers.append(namer)
        if len(self._candidates) > MAX_CANDIDATES * self.k:
            self._forget_farthest(len(self._candidates) - MAX_CANDIDATES * self.k)

    def _forget_farthest(self, count: int) -> None:
        """Forget so many of those that others named and that were not asked: fewer than half of all may be asked."""
        gone = set([each for each in self._candidates if not each.asked and each not in self._own][-count:])
        for each in gone:
            del self._by_id[each.contact.id]
        self._candidates = [each for each in self._candidates if each not in gone]

    def _widen(self) -> None:
        """Have more of our own contacts as candidates, once somebody is slow.

        When many have just died, each responder names the same k closest, most of them dead, and not the living behind.
        """
        if not self._widened:
            self._widened = True
            self._add(self._outside(self.protocol.router.closest(self.target.long_id, WIDER * self.k)))

    def _add_named(self, nodes: Iterable[ids.NodeTuple]) -> None:
        """Candidates that a responder named; of those in our own table we know better whether they answer."""
        find = self.protocol.router.find
        news = (node for node in nodes if self._is_news(node) and ids.is_askable(node))
        # a stock node that is bound to `::` names IPv4 addresses as its socket writes them
        contacts = (find(node.id) or Contact(node.id, ids.plain(node.ip), node.port) for node in news)
        # alpha, as with the stale: where half of all have died, one of three is alive in most cases.
        unheard = self._outside(contacts)
        named = (each for each in unheard if each.address not in self._addresses and each.address not in self.silent)
        self._add(named, Namer(self.alpha))

    def _outside(self, contacts: Iterable[Contact]) -> Iterable[Contact]:
        hole = self._hole
        return contacts if hole is None else (each for each in contacts if each.long_id ^ hole.key >= hole.radius)

    def _is_news(self, node: ids.NodeTuple) -> bool:
        """Whether it matters that somebody names it: most are candidates already that need nobody to name them."""
        known = self._by_id.get(node.id)
        return node.id not in self._by_id if known is None else known.namers is not None

    def _is_vouched_for(self, candidate: Candidate) -> bool:
        """Whether it may be asked: it is known, or named by one whose nodes have not failed too often."""
        return candidate.namers is None or any(namer.credit > 0 for namer in candidate.namers)

    def _window(self) -> Iterator[Candidate]:
        """The k closest that count, and whoever is slow among them.

        Those that failed do not count, nor those known to be stale before they are asked. A slow one that does not
        answer is probably dead: the next is asked meanwhile, not two seconds later when it has failed.
        """
        counted = 0
        for candidate in self._candidates:
            if counted == self.k:
                break
            if not candidate.failed and (candidate.asked or (not candidate.stale and self._is_vouched_for(candidate))):
                yield candidate
                counted += candidate.answered or not candidate.slow

    def _next(self) -> tuple[Candidate | None, bool]:
        """Whom to ask now, the nearest of the window or at last a stale one; and whether all of it have answered."""
        stale: Candidate | None = None
        answered = only_stale_waited_for = True
        counted = 0
        for candidate in self._candidates:
            if candidate.failed:
                continue
            if not candidate.asked:
                if not self._is_vouched_for(candidate):
                    continue
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

    def _next_root(self) -> Candidate | None:
        """One of our own contacts to be asked besides, until enough of them have answered."""
        own = [each for each in self._own if not each.failed]
        if sum(each.answered or (each.asked and not each.slow) for each in own) >= ROOTS:
            return None
        return next((each for each in own if not each.asked), None)

    def _advance(self) -> None:
        if self._finished is None or self._finished.done():
            return
        done, complete = self.is_done(), False
        while not done:
            candidate, complete = self._next()
            candidate = candidate or self._next_root()
            if candidate is None or self._in_flight >= self.alpha or self._asked >= MAX_ASKED * self.k:
                break
            candidate.asked = True
            if len(self._first) < self.alpha:
                self._first.append(candidate)
            for namer in candidate.namers or ():
                namer.credit -= 1
            self._asked += 1
            self._stale_asked += candidate.stale
            self._ask(candidate)
        if done or self._awaited == 0 or (complete and candidate is None):
            if not done and self._awaited == 0 and (self._try_again() or self._trust_again()):
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

    def _trust_again(self) -> bool:
        """Believe those who named nodes that do not answer a little longer, where hardly anybody has answered.

        Whoever knows one node, and asks it just after the three died that are nearest, would find nobody.
        """
        if self._asked >= MAX_ASKED * self.k or sum(each.answered for each in self._candidates) >= ROOTS:
            return False
        named = [each for each in self._candidates if not (each.asked or each.failed or self._is_vouched_for(each))]
        for namer in {namer for each in named for namer in each.namers or ()}:
            namer.credit = self.alpha
        return bool(named)

    def _ask(self, candidate: Candidate) -> None:
        self._in_flight += 1
        candidate.holds_place = True
        self._await(candidate)
        self.query(candidate).add_done_callback(lambda future: self._receive(candidate, future.result()))

    def _await(self, candidate: Candidate) -> None:
        self._awaited += 1
        candidate.slow = False
        patience = self.protocol.round_trips.slow_after(candidate.contact.address)
        candidate.timer = asyncio.get_running_loop().call_later(patience, self._be_slow, candidate)

    def _came(self, candidate: Candidate) -> bool:
        """Note that the wait for this one is over. Returns whether it still matters."""
        if self._finished is None or self._finished.done():
            return False
        if candidate.timer is not None:
            candidate.timer.cancel()
        self._awaited -= 1
        self._free_place(candidate)
        return True

    def _free_place(self, candidate: Candidate) -> None:
        self._in_flight -= candidate.holds_place
        candidate.holds_place = False

    def _be_slow(self, candidate: Candidate) -> None:
        """Do not wait for this one only: its place in flight is free for the next."""
        candidate.slow = True
        self._widen()
        candidate.timer = asyncio.get_running_loop().call_later(SILENCE, self._be_silent, candidate)
        self._free_place(candidate)
        self._advance()

    def _be_silent(self, candidate: Candidate) -> None:
        """Whoever has enough without this one need not wait for it."""
        candidate.silent = True
        self._advance()

    def _receive(self, candidate: Candidate, outcome: Outcome) -> None:
        if not self._came(candidate):
            return
        found: wire.Found | None = outcome[1]
        if found is None:
            candidate.failed = not candidate.answered
            self.silent.add(candidate.contact.address)
        else:
            self._stale_limit += 2 * candidate.stale
            again = self.receive(candidate, found)
            self._add_named(found.nodes)
            if again:
                self._ask(candidate)
            elif self.protocol.is_known(candidate.contact) or not self.needs_id(candidate):
                self._accept(candidate)
            else:
                self._await(candidate)
                pinged = self.protocol.call_ping(candidate.contact)
                pinged.add_done_callback(lambda future: self._receive_id(candidate, future.result()))
        self._advance()

    def _receive_id(self, candidate: Candidate, outcome: Outcome) -> None:
        """Whether the one that replied is who it was named to be; if it is another, that is whom it counts as."""
        if not self._came(candidate):
            return
        contact = candidate.contact
        if outcome[1] == contact.id:
            self._accept(candidate)
        else:
            candidate.failed = True
            if ids.is_id(outcome[1]) and outcome[1] not in (*self._by_id, ids.TRANSIENT_ID):
                self._add([Contact(outcome[1], *contact.address)])
                other = self._by_id.get(outcome[1])
                if other is not None:  # else forgotten at once, as the farthest unasked
                    other.asked, other.envelopes, other.shown = True, candidate.envelopes, candidate.shown
                    self._accept(other)
        self._advance()

    def _accept(self, candidate: Candidate) -> None:
        """It has answered, as the node that it is named to be."""
        if candidate.contact.address in self._addresses and not candidate.answered:
            candidate.failed = True
            return
        candidate.answered = True
        self._addresses.add(candidate.contact.address)
        for namer in candidate.namers or ():
            namer.credit += 2
        candidate.namers = None


async def beyond(
    protocol: Asker, crowd: Hole, nodes: float, *, k: int, alpha: int, timeout: float, margin: int = 0
) -> list[Contact]:
    """Nodes at the distance at which the farthest of the key's k closest would be among so many, by chance.

    They are looked up by ids that differ from the key in one high bit: of those everybody names others than the crowd.
    Two such bits, and `margin` more on either side for a reader, so that whoever takes the network for half or twice as
    large finds one of them, too.
    """
    targets = [(crowd.key ^ 1 << bit).to_bytes(ids.ID_BYTES) for bit in density.reach_bits(k, nodes, margin)]
    lookups = (NodeLookup(protocol, target, k=k, alpha=alpha, hole=crowd).run(timeout) for target in targets)
    found: Sequence[list[Contact]] = await asyncio.gather(*lookups)
    return list({contact.address: contact for each in found for contact in each}.values())
