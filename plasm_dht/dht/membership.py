"""How a node joins the network and stays in it: bootstrap addresses, neighbours that are too few, buckets that idle."""

import asyncio
import contextlib
import logging
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

from plasm_dht.clock import Clock
from plasm_dht.dht import ids
from plasm_dht.dht.ids import Address, plain
from plasm_dht.dht.lookup import NodeLookup
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.stats import counted
from plasm_dht.errors import ConfigError
from plasm_dht.values import format_address

log = logging.getLogger(__name__)

# How often a node sees to its tables (s).
UPKEEP = 60.0
# Without a neighbour the bootstrap addresses are asked again after the first of these, doubling up to the second (s).
RETRY_FIRST, RETRY_LONGEST = 1.0, 60.0
# The bootstrap addresses are asked again this often: with fewer than k live contacts, and with k (s).
ASK_AGAIN_FEW, ASK_AGAIN = 300.0, 3600.0
# A resolver that hangs holds up nobody longer than this (s).
RESOLVE_WITHIN = 3.0
# Attempts to find neighbours through a bootstrap node that answered: on a bad link a lookup through one contact fails.
JOIN_ATTEMPTS = 3
# Stale contacts that are pinged every `ASK_AGAIN_FEW` s while few are live, so that a healed link is noticed.
REVIVALS = 3
# Contacts whose addresses outlive the process, in multiples of k: the k closest, and others from all over the network.
REMEMBERED = 3
# Neighbours that are asked which address of ours they see.
STUN_NEIGHBOURS = 8


def check_address(address: Address) -> Address:
    """The (host, port) itself. Raises `ConfigError` for a port that cannot be."""
    host, port = address
    if type(port) is not int or not 0 < port < 65536:
        raise ConfigError(f"port {port!r} of {host!r} must be an integer from 1 to 65535")
    return str(host), port


def _random_id(low: int, high: int) -> bytes:
    return random.randint(low, high).to_bytes(ids.ID_BYTES)


class Membership:
    """Keeps a node among its neighbours. `tidy` is awaited at each upkeep, for whoever else has something to forget."""

    def __init__(
        self, protocol: PlasmProtocol, clock: Clock, *, k: int, alpha: int, tidy: Callable[[], Awaitable[None]]
    ) -> None:
        self._protocol = protocol
        self._clock = clock
        self._k = k
        self._alpha = alpha
        self._tidy = tidy
        self._addresses: list[Address] = []
        self._known = protocol.storage.contacts  # of the node's earlier run
        self._asked_at = self._revived_at = 0.0
        self._retry = RETRY_FIRST
        self._woken = asyncio.Event()
        protocol.router.on_alone = self._woken.set  # else nobody is asked before the next upkeep
        self._has_joined = False
        self._seen_at: str | None = None
        self._remembered = -1  # the version of the routing table

    @property
    def _is_transient(self) -> bool:
        return bool(self._protocol.source_node.id == ids.TRANSIENT_ID)

    async def bootstrap(self, addresses: Iterable[Address], *, replace: bool = False) -> list[Contact]:
        """Join through these (host, port), and remember them. Returns the neighbours found, nearest first.

        `replace`: forget those of before. What is known of their nodes stays.
        """
        self._addresses = list(dict.fromkeys([*([] if replace else self._addresses), *addresses]))
        await self._ask(self._addresses)
        neighbours = await self._find_neighbours()
        if not self._is_transient:
            self._report()
            self._woken.set()
        return neighbours

    async def seen_address(self, *, ipv4: bool = True, ipv6: bool = True) -> str | None:
        """The IP address of these families that most of our neighbours see us at; `None` when nobody said one."""
        neighbours = self._protocol.router.closest(self._protocol.source_node.long_id, STUN_NEIGHBOURS)
        outcomes = await asyncio.gather(*(self._protocol.call_stun(neighbour) for neighbour in neighbours))
        seen = Counter(plain(address[0]) for _, address in outcomes if address is not None)
        of_family = [ip for ip in seen if (ipv6 if ":" in ip else ipv4) and ids.is_of_use(ip)]
        # of as many votes the one of before: an address that changes to and fro would be published each time
        self._seen_at = max(of_family, key=lambda ip: (seen[ip], ip == self._seen_at), default=self._seen_at)
        return self._seen_at if of_family else None

    async def run(self) -> None:
        """See to the tables, and ask for neighbours where they are few, until cancelled."""
        if not self._is_transient:
            try:
                await self._stay()
            finally:
                self._remember()

    async def _stay(self) -> None:
        tidied = self._clock.monotonic()
        while True:
            if self._has_joined:
                self._has_joined = False
                await self._meet_the_far()
                self._remember()
            now = self._clock.monotonic()
            ask_at = self._ask_at()
            due = min(tidied + UPKEEP, ask_at) - now
            if due > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(due):
                        await self._woken.wait()
                self._woken.clear()
                continue
            if now >= ask_at:
                before = self._protocol.router.live_count
                await self._ask(self._addresses if before else [*self._addresses, *self._known])
                if self._protocol.router.live_count > before:
                    await self._find_neighbours()
                self._report()
            if now >= tidied + UPKEEP:
                tidied = now
                await self._see_to_table()
                await self._tidy()

    # -- joining -----------------------------------------------------------------------------------------------------

    async def _ask(self, addresses: Iterable[Address]) -> None:
        """Ping the nodes at these (host, port): who answers becomes a contact."""
        router = self._protocol.router
        self._asked_at = self._clock.monotonic()
        reaching = [asyncio.ensure_future(self._reach(named)) for named in addresses]
        try:
            for reached in asyncio.as_completed(reaching):
                await reached
                if self._is_transient and router.live_count:
                    break  # whoever only asks needs one that answers, and no dead one must hold it up
        finally:
            for each in reaching:
                each.cancel()
            await asyncio.gather(*reaching, return_exceptions=True)

    async def _find_neighbours(self) -> list[Contact]:
        router = self._protocol.router
        if self._is_transient or not router.live_count:
            return router.live()
        for _ in range(JOIN_ATTEMPTS):
            if neighbours := await self._find_nodes(self._protocol.source_node.id):
                self._has_joined = True
                break
        return neighbours

    async def _meet_the_far(self) -> None:
        """Look up a random id at each distance beyond the neighbours where few are known (the paper, section 2.3).

        A node that has only looked up its own id knows its neighbours: its lookups then take twice as many hops, and
        one in some hundreds ends among nodes of which none knows anybody on the side of the key, and finds nothing. In
        a network of 1,000 nodes these are five or six lookups.
        """
        for low, high in self._protocol.router.thin_ranges():
            await self._find_nodes(_random_id(low, high))

    async def _reach(self, named: Address) -> None:
        """Ping a bootstrap node at all of its addresses; a name that means nobody but this node is asked no more."""
        own = self._protocol.source_node.id
        addresses = await self._resolve(*named)
        beyond = [ip for ip, _ in addresses if not self._protocol.reaches(ip)]
        if beyond and not self._protocol.transport.is_closing():
            log.warning("bootstrap address %s cannot be reached from %s: listen on ::", beyond[0], self._own_ip())
        # shielded, since others may wait for the same ping
        pings = [asyncio.shield(self._protocol.ping_address(address)) for address in addresses]
        answers = await asyncio.gather(*pings)
        only_own = bool(answers) and all(answered and node_id == own for answered, node_id in answers)
        if only_own and not self._is_transient and named in self._addresses:
            self._addresses.remove(named)

    async def _resolve(self, host: str, port: int) -> list[Address]:
        if ids.is_reachable(host):  # an IP address goes to no resolver
            return [(plain(host), port)]
        own = self._own_ip()
        family = socket.AF_UNSPEC if own == "::" else socket.AF_INET6 if ":" in own else socket.AF_INET
        try:
            async with asyncio.timeout(RESOLVE_WITHIN):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_DGRAM)
        except TimeoutError:
            log.warning("bootstrap host %r: no answer about its address in %.0f s", host, RESOLVE_WITHIN)
            return []
        except (OSError, UnicodeError) as error:
            log.warning("bootstrap host %r has no address: %s", host, error)
            return []
        return [(str(sockaddr[0]), port) for *_, sockaddr in found]

    def _own_ip(self) -> str:
        return str(self._protocol.transport.get_extra_info("sockname")[0])

    async def _find_nodes(self, key: bytes) -> list[Contact]:
        return await NodeLookup(self._protocol, key, k=self._k, alpha=self._alpha).run()

    def _ask_at(self) -> float:
        """When bootstrap addresses, and without a neighbour those of an earlier run, are asked again (monotonic)."""
        live = self._protocol.router.live_count
        if not self._addresses and (live or not self._known):
            return float("inf")
        wait = self._retry if live == 0 else ASK_AGAIN_FEW if live < self._k else ASK_AGAIN
        return self._asked_at + wait

    def _report(self) -> None:
        """Say whether there are neighbours, and ask again later and later while there are none."""
        live = self._protocol.router.live_count
        if live:
            if self._retry != RETRY_FIRST:
                log.info("joined the network: %s", counted(live, "neighbour"))
            self._retry = RETRY_FIRST
        elif self._addresses or self._known:
            asked = ", ".join(map(format_address, self._addresses))
            asked = asked or f"{counted(len(self._known), 'contact')} of an earlier run"
            log.warning("no bootstrap node answered (%s): trying again in %.0f s", asked, self._retry)
            self._retry = min(self._retry * 2, RETRY_LONGEST)

    # -- upkeep ------------------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """Have the storage keep where neighbours and others are, if it outlives the process."""
        router = self._protocol.router
        if router.version == self._remembered:
            return
        self._remembered = router.version
        near = router.closest(self._protocol.source_node.long_id, self._k)
        closest = {contact.id for contact in near}
        far = sorted((each for each in router.live() if each.id not in closest), key=lambda each: each.long_id)
        step = len(far) // ((REMEMBERED - 1) * self._k) + 1
        if near:  # a node that has lost everybody finds them where they were
            self._protocol.storage.keep_contacts([contact.address for contact in (*near, *far[::step])])

    async def _see_to_table(self) -> None:
        router = self._protocol.router
        router.expire_stale()
        now = self._clock.monotonic()
        few = router.live_count < self._k
        quiet = min(router.live(), key=lambda contact: contact.heard_at, default=None) if few else None
        if quiet is not None and now - quiet.heard_at >= UPKEEP:
            self._protocol.call_ping(quiet)  # in a small network nobody else finds out that it has died
        if few and now - self._revived_at >= ASK_AGAIN_FEW:
            self._revived_at = now
            for contact in router.closest(self._protocol.source_node.long_id, REVIVALS, stale=True):
                self._protocol.call_ping(contact)
        # Look up a random id at each distance that no lookup went to for an hour (the paper, section 2.3).
        for bucket in router.neglected():
            await self._find_nodes(_random_id(*bucket.range))
        self._remember()
